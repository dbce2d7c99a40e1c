"""The report's block on what the model knows: latents that fire on known names and not on invented ones."""

from collections.abc import Collection, Sequence
from statistics import fmean

import numpy as np

from guard.lab.report import plots
from guard.lab.report.analysis import Knowing, knowing, place
from guard.lab.report.blocks import Block, Measure, Table, counted, over_depth
from guard.lab.report.data import KnownLatent, KnownRow, NameRow, PlotData
from guard.lab.report.reading import Bools, Guess
from guard.lab.report.stimuli import Named
from guard.lab.suite.sae import FullSae

RECALLED = 0.1  # probability of the true answer's first token, from which the model is said to know it
_LATENTS = 5  # of an SAE, that are shown
_KINDS = ("known", "rare", "invented")


def find_knowing(sae: FullSae, names: Sequence[Named], fired: Bools, guessed: Sequence[Guess]) -> KnownRow:
    """`fired [names, K]`: on the name or behind it."""
    frames = list(dict.fromkeys(one.frame for one in names))
    found = knowing(fired, [frames.index(one.frame) for one in names], [one.kind for one in names])
    rare = np.array([one.kind == "rare" for one in names])
    recalled = np.array([(guess.answer_probability or 0.0) >= RECALLED for guess in guessed])
    return KnownRow(
        sae=sae.name,
        hook_point=sae.hook_point,
        latents=len(found.latents),
        swapped=found.swapped,
        shuffled=found.shuffled,
        best=[_latent(found, fired, latent, rare, recalled) for latent in found.latents[:_LATENTS]],
    )


def _latent(found: Knowing, fired: Bools, latent: int, rare: Bools, recalled: Bools) -> KnownLatent:
    def share(chosen: Bools) -> float | None:
        return float(fired[chosen, latent].mean()) if chosen.any() else None

    return KnownLatent(
        latent=latent,
        known=float(found.known[:, latent].mean()),
        rare=float(found.rare[:, latent].mean()),
        rare_recalled=share(rare & recalled),
        rare_not_recalled=share(rare & ~recalled),
        invented=float(found.invented[:, latent].mean()),
    )


def clearest(rows: Sequence[KnownRow]) -> tuple[KnownRow, KnownLatent] | None:
    """The latent that parts known from invented names most, of all SAEs."""
    found = [(row, latent) for row in rows for latent in row.best]
    return max(found, key=lambda pair: pair[1].known - pair[1].invented) if found else None


def name_rows(names: Sequence[Named], guessed: Sequence[Guess], fires: Sequence[bool] | None) -> list[NameRow]:
    """`fires`: whether the clearest latent does, on each name."""
    return [
        NameRow(
            frame=one.frame,
            prompt=one.prompt,
            kind=one.kind,
            answer=one.answer,
            tokens=guess.name_tokens,
            top=guess.top,
            top_probability=guess.top_probability,
            answer_probability=guess.answer_probability,
            answer_first=guess.answer_first,
            fires=None if fires is None else bool(fires[index]),
        )
        for index, (one, guess) in enumerate(zip(names, guessed, strict=True))
    ]


def known_blocks(rows: Sequence[KnownRow], named: Sequence[NameRow], compared: Collection[str]) -> list[Block]:
    """`compared`: the SAEs of which layers are compared."""
    return [_latent_block(rows, named, compared), _name_block(rows, named)]


def _latent_block(rows: Sequence[KnownRow], named: Sequence[NameRow], compared: Collection[str]) -> Block:
    panels = over_depth(
        [row for row in rows if row.sae in compared],
        [
            Measure("on known, not on invented", lambda r: float(r.latents), colour=0),
            Measure("on invented, not on known", lambda r: float(r.swapped), True, 1),
            Measure("names mixed at random", lambda r: r.shuffled, True, 5),
        ],
        "latents of an SAE",
    )
    frames = len({row.frame for row in named})
    tokens = {kind: fmean(row.tokens for row in named if row.kind == kind) for kind in _KINDS}
    found, swapped = sum(r.latents for r in rows), sum(r.swapped for r in rows)
    best = clearest(rows)
    told = ""
    if best:
        row, latent = best
        told = (
            f" The clearest, {place(row.hook_point).short}: {latent.latent} of {row.sae}, fires on {latent.known:.0%} "
            f"of known, {latent.rare:.0%} of rare and {latent.invented:.0%} of invented names"
        )
        if latent.rare_recalled is not None and latent.rare_not_recalled is not None:
            told += (
                f" (rare ones whose answer the model gives a probability of {RECALLED:g} or more: "
                f"{latent.rare_recalled:.0%}, the others: {latent.rare_not_recalled:.0%})"
            )
        told += "."
    data = PlotData[KnownRow](
        id="known",
        title="Latents that are silent on what the model does not know",
        caption=f"Latents that, in at least half of {frames} frames, fire on 3 of 4 known names or more and on 1 of 4 "
        "invented ones or fewer (on the name or behind it); dashed, the same the other way round and with names mixed. "
        f"Invented names also break into more tokens ({tokens['invented']:.1f} on average, known ones "
        f"{tokens['known']:.1f}), so that a latent may mark a common word and no knowledge; rare real names "
        f"({tokens['rare']:.1f} tokens) are the control: a latent of knowledge fires on those that it can complete.",
        n={"frames": frames, "names": len(named), "SAEs": len(rows), "SAEs compared": len(compared)},
        finding=f"{counted(found, 'latent')} in {counted(len(rows), 'SAE')} fire on the known and not on the invented; "
        f"{swapped:,} the other way round.{told}",
        rows=list(rows),
    )
    table = Table(
        ["latent", "known", "rare", "rare, recalled", "rare, not recalled", "invented"],
        [
            [
                f"{place(row.hook_point).short}: {x.latent} ({row.sae})",
                f"{x.known:.0%}",
                f"{x.rare:.0%}",
                "" if x.rare_recalled is None else f"{x.rare_recalled:.0%}",
                "" if x.rare_not_recalled is None else f"{x.rare_not_recalled:.0%}",
                f"{x.invented:.0%}",
            ]
            for row in rows
            for x in row.best
        ],
    )
    tables = [("The clearest latents of each SAE: share of names on which they fire", table)] if table.rows else []
    return Block(data, [("", plots.lines(panels, key="known", about=data.title))], tables)


def _name_block(rows: Sequence[KnownRow], named: Sequence[NameRow]) -> Block:
    said = []
    for kind in ("known", "rare"):
        of = [row for row in named if row.kind == kind]
        said.append(
            f"{sum(row.answer_first for row in of)} of {len(of)} {kind} names "
            f"(mean probability {fmean(row.answer_probability or 0.0 for row in of):.2f})"
        )
    tops = fmean(row.top_probability for row in named if row.kind == "invented")
    best = clearest(rows)
    where = f"{place(best[0].hook_point).short}: {best[1].latent} of {best[0].sae}" if best else "none was found"
    data = PlotData[NameRow](
        id="names",
        title="What the model says next",
        caption="The likeliest next token of each prompt, the probability of the true answer's first token, and "
        f"whether the clearest latent ({where}) fires on the name or behind it.",
        n={"prompts": len(named)},
        finding=f"The true answer is the likeliest next token for {' and '.join(said)}; for invented names the "
        f"likeliest token has a probability of {tops:.2f} on average.",
        rows=list(named),
    )
    table = Table(
        ["prompt", "name is", "answer", "likeliest", "latent", "tokens", "P(likeliest)", "P(answer)"],
        [
            [
                row.prompt,
                row.kind,
                row.answer,
                row.top,
                "" if row.fires is None else "fires" if row.fires else "silent",
                str(row.tokens),
                f"{row.top_probability:.2f}",
                "" if row.answer_probability is None else f"{row.answer_probability:.2f}",
            ]
            for row in named
        ],
        5,
    )
    return Block(data, (), [("Every prompt", table)])
