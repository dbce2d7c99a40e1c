"""The report's block on entities and concepts: at which depth a latent stands for one."""

from collections.abc import Collection, Sequence
from itertools import compress

import numpy as np

from guard.lab.report import plots
from guard.lab.report.analysis import (
    OTHER_SHARE,
    OWN_SENTENCES,
    Doubles,
    chance_latents,
    depth_gap,
    item_latents,
    mean_depth,
    place,
)
from guard.lab.report.blocks import Block, Measure, Table, by_site, over_depth
from guard.lab.report.data import ItemCount, PlotData
from guard.lab.report.reading import Bools
from guard.lab.report.stimuli import Item
from guard.lab.suite.sae import FullSae


def sentences(items: Sequence[Item], lang: str) -> list[tuple[int, str]]:
    """The item's number and the text of each sentence in `lang`, numbered over the items that have any."""
    having = [item for item in items if getattr(item, lang)]
    return [(index, text) for index, item in enumerate(having) for text in getattr(item, lang)]


def count_items(sae: FullSae, items: Sequence[Item], en: Bools, zh: Bools) -> list[ItemCount]:
    """Entities and concepts in English, entities in Chinese; arrays `[sentences, K]` in the order of `sentences`."""
    in_chinese = [item for item in items if item.zh]
    numbers_zh = [index for index, _ in sentences(items, "zh")]
    fires_zh = {
        item.id: zh[np.equal(numbers_zh, index)].sum(axis=0) >= OWN_SENTENCES for index, item in enumerate(in_chinese)
    }
    rows = []
    for lang, having, fired in (("en", items, en), ("zh", in_chinese, zh)):
        numbers = [index for index, _ in sentences(items, lang)]
        found, chance = item_latents(fired, numbers), chance_latents(fired, numbers)
        for kind in ("entity", "concept"):
            of_kind = [item.kind == kind for item in having]
            if not any(of_kind):
                continue
            latents = {
                item.id: np.flatnonzero(own).tolist()
                for item, own in zip(compress(having, of_kind), found[of_kind], strict=True)
                if own.any()
            }
            with_chinese = [id_ for id_ in latents if lang == "en" and id_ in fires_zh]
            rows.append(
                ItemCount(
                    sae=sae.name,
                    hook_point=sae.hook_point,
                    kind=kind,
                    lang=lang,
                    items=sum(of_kind),
                    items_found=len(latents),
                    latents=sum(map(len, latents.values())),
                    chance=float(chance[of_kind].sum()),
                    found=latents,
                    cross=sum(bool(fires_zh[id_][latents[id_]].any()) for id_ in with_chinese),
                    cross_of=len(with_chinese),
                )
            )
    return rows


def item_block(rows: Sequence[ItemCount], items: Sequence[Item], compared: Collection[str]) -> Block:
    """`compared`: the SAEs of which layers are compared."""

    def of(kind: str, lang: str = "en") -> list[ItemCount]:
        return [row for row in rows if (row.kind, row.lang) == (kind, lang) and row.sae in compared]

    entities, concepts, chinese = of("entity"), of("concept"), of("entity", "zh")
    share = over_depth(
        entities, [Measure("entities, English", lambda r: r.items_found / r.items, colour=0)], "share found"
    )
    for panel, other, third in zip(
        share,
        over_depth(concepts, [Measure("concepts, English", lambda r: r.items_found / r.items, colour=1)], ""),
        over_depth(chinese, [Measure("entities, Chinese", lambda r: r.items_found / r.items, True, 2)], ""),
        strict=True,
    ):
        panel.lines.extend([*other.lines, *third.lines])
    crossing = over_depth(
        [row for row in entities if row.cross_of],
        [Measure("of them", lambda r: r.cross / r.cross_of, colour=2)],
        "share that fires in Chinese too",
    )
    findings = [_finding(site, depths, entities, concepts, items) for site, depths in by_site(entities).items()]
    data = PlotData[ItemCount](
        id="entities",
        title="Entities and concepts over depth",
        caption="Share of entities (sentences that name them) and of concepts (sentences that show them and never use "
        f"the word) with a latent of their own: one that fires in at least {OWN_SENTENCES} of the item's 6 sentences "
        f"and in at most {OTHER_SHARE:.0%} of all others of that language. Mean over the SAEs of a layer, "
        "of the configurations that stand at every layer.",
        n={
            "entities": sum(item.kind == "entity" for item in items),
            "concepts": sum(item.kind == "concept" for item in items),
            "entities in Chinese": sum(bool(item.zh) for item in items),
            "sentences": sum(len(item.en) + len(item.zh) for item in items),
            "SAEs": len({row.sae for row in rows}),
            "SAEs compared": len(entities),
        },
        finding=" ".join(findings),
        rows=list(rows),
    )
    drawn = [("", plots.lines(share, key="entities", about=data.title))]
    if crossing:
        about = "Entities whose English latent fires on their Chinese sentences too"
        drawn.append((about, plots.lines(crossing, key="crossing", about=about)))
    return Block(
        data, drawn, [("Latents found, and as many by chance", _table(rows)), ("Examples", _examples(rows, items))]
    )


def _finding(
    site: str,
    depths: dict[int, list[ItemCount]],
    entities: Sequence[ItemCount],
    concepts: Sequence[ItemCount],
    items: Sequence[Item],
) -> str:
    early, late = (
        _covered(kind, site, list(depths), of, items) for kind, of in (("entity", entities), ("concept", concepts))
    )
    if not early.any() or not late.any():
        absent = " and ".join(name for name, found in (("entity", early), ("concept", late)) if not found.any())
        return f"{site}: no latent of its own was found for any {absent}."
    where = list(depths)
    gap, low, high = depth_gap(early, late, where)
    said = "later than" if low > 0 else "earlier than" if high < 0 else "neither clearly before nor clearly after"
    return (
        f"{site}: entities are found at layer {mean_depth(early, where):.1f} on average, concepts at "
        f"{mean_depth(late, where):.1f}: concepts come {said} names (difference {gap:+.1f} layers, "
        f"95% interval {low:+.1f} to {high:+.1f}, over items)."
    )


def _covered(kind: str, site: str, depths: list[int], rows: Sequence[ItemCount], items: Sequence[Item]) -> Doubles:
    """`[items, depths]`: share of a layer's SAEs in which an item has a latent of its own."""
    there = by_site(rows)[site]
    of_kind = [item.id for item in items if item.kind == kind]
    return np.array([[np.mean([id_ in row.found for row in there[d]]) for d in depths] for id_ in of_kind])


def _table(rows: Sequence[ItemCount]) -> Table:
    return Table(
        ["SAE", "kind", "language", "found", "latents", "by chance"],
        [[r.sae, r.kind, r.lang, f"{r.items_found} of {r.items}", f"{r.latents:,}", f"{r.chance:.1f}"] for r in rows],
        3,
    )


def _examples(rows: Sequence[ItemCount], items: Sequence[Item]) -> Table:
    """Each item with the layers at which any SAE has a latent for it."""
    lines = []
    for item in items:
        found = [row for row in rows if row.lang == "en" and item.id in row.found]
        sites = by_site(found)
        said = "; ".join(f"{site} {', '.join(map(str, depths))}" for site, depths in sites.items())
        first = f"{place(found[0].hook_point).short}: {found[0].found[item.id][0]}" if found else ""
        lines.append([item.name, item.kind, item.group, said or "none", first])
    return Table(["item", "kind", "group", "found at", "a latent"], lines, 5)
