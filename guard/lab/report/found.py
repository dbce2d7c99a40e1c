"""The report's blocks on what was found at which rate, and on how much of it holds elsewhere."""

from collections.abc import Sequence

import numpy as np

from guard.lab.report import plots
from guard.lab.report.blocks import Block, Table, domains_in_order
from guard.lab.report.data import PlotData
from guard.lab.search.contrast import ALL
from guard.lab.search.precision import Count, Precision, Summary

_JUDGES = {
    ("contrast", "other pairs"): "tags that half of the pairs chose, on the other half",
    ("labelled", "other sources"): "tags that half of the groups of sources chose, on the other half",
    ("contrast", "sources"): "latents that pairs alone found in a domain, on sources",
    ("labelled", "pairs"): "latents that sources alone found in a domain, on pairs",
}


def found_blocks(summary: Summary) -> list[Block]:
    return [_count_block(summary), _precision_block(summary)]


def _count_block(summary: Summary) -> Block:
    whole = [count for count in summary.counts if count.subdomain == ALL]
    depths = sorted({count.depth for count in whole})
    at = {(count.domain, count.depth): count for count in whole}
    domains = domains_in_order([count.domain for count in whole])
    shares = np.array([[100 * at[d, depth].found / max(at[d, depth].latents, 1) for depth in depths] for d in domains])
    most = max(whole, key=lambda count: count.found / max(count.latents, 1))
    data = PlotData[Count](
        id="found",
        title="Latents found, by domain and depth",
        caption=f"Percent of a depth's latents that are found to hold a domain's concept, of all SAEs there. Of those "
        f"found in a domain at a depth, {summary.fdr:.0%} are false ({summary.control.upper()}, over latents); a "
        "latent answers several questions of a domain, by pairs and by sources, and counts once.",
        n={
            "SAEs": len(summary.saes),
            "pairs": summary.pairs,
            "groups of sources": sum(map(len, summary.halves.values())),
        },
        finding=f"Most are found for {most.domain} at layer {most.depth}: {most.found:,} of {most.latents:,} latents.",
        rows=summary.counts,
    )
    table = Table(
        ["domain", "layer", "latents", "found", "by contrast", "by labels", "by both", "surface forms"],
        [
            [
                count.domain,
                *(
                    f"{n:,}"
                    for n in (
                        count.depth,
                        count.latents,
                        count.found,
                        count.by_contrast,
                        count.by_labels,
                        count.by_both,
                        count.surface,
                    )
                ),
            ]
            for count in whole
        ],
    )
    drawn = plots.heat(domains, [str(d) for d in depths], shares, x="layer", key="found", about=data.title)
    return Block(data, [("", drawn)], [("Numbers", table)])


def _precision_block(summary: Summary) -> Block:
    overall = [p for p in summary.precision if p.depth is None and p.chosen]
    said = [
        f"Of {p.chosen:,} {_JUDGES[p.chosen_by, p.judged_on]}, {_percent(p.confirmed)} are confirmed "
        f"({_percent(p.expected)} by chance; {_percent(p.untested)} cannot be tested there)."
        for p in overall
    ]
    data = PlotData[Precision](
        id="precision",
        title="What holds on data that did not choose it",
        caption="Confirmed: fires more where the concept is, with p of 0.05 or less, on data that had no part in the "
        "choice. Not testable: fires too rarely there; such a one counts as chosen and not as confirmed. By chance: "
        "what would be confirmed of as many that hold nothing.",
        n={"pairs": summary.pairs, "groups of sources": sum(map(len, summary.halves.values()))},
        finding=" ".join(said) or "Nothing was chosen that could be judged elsewhere.",
        rows=summary.precision,
    )
    return Block(data, (), [("By domain and layer", _table(summary.precision))])


def _table(rows: Sequence[Precision]) -> Table:
    return Table(
        ["domain", "chosen by", "judged on", "layer", "chosen", "not testable", "confirmed", "by chance"],
        [
            [
                "all" if p.depth is None else p.domain,
                p.chosen_by,
                p.judged_on,
                "all" if p.depth is None else str(p.depth),
                f"{p.chosen:,}",
                *(_percent(share) for share in (p.untested, p.confirmed, p.expected)),
            ]
            for p in rows
        ],
        3,
    )


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.0%}"
