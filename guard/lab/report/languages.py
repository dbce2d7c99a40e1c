"""The report's blocks on the same queries in English and Chinese: where activations part, and which candidates do."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

import numpy as np

from guard.lab.heads.features import Floats
from guard.lab.report import plots
from guard.lab.report.analysis import LANGUAGES, cosine, jaccard, language_of, overlap, place
from guard.lab.report.blocks import Block, Measure, Table, by_site, hook_points, over_depth
from guard.lab.report.data import LanguageCandidate, LanguageRow, PlotData
from guard.lab.report.reading import Bools
from guard.lab.report.stimuli import Translated
from guard.lab.search.candidates import Candidate
from guard.lab.suite.sae import FullSae

_LEAST = 3  # queries on which a latent must fire in a language to be counted in it
_SHOWN = 24
_NAMES = {"both": "both languages", "en": "English only", "zh": "Chinese only", "few": "on few queries"}


def compare_languages(
    sae: FullSae, queries: Sequence[Translated], fired: tuple[Bools, Bools], means: tuple[Floats, Floats]
) -> LanguageRow:
    """`fired [N, K]` and `means [N, d_model]` of the English queries and of the Chinese ones, in the same order."""
    alike = jaccard(*fired)
    found, near, near_apart = overlap(alike), overlap(cosine(*means, apart=False)), overlap(cosine(*means, apart=True))
    risky = np.array([bool(query.domain) for query in queries])
    return LanguageRow(
        sae=sae.name,
        hook_point=sae.hook_point,
        jaccard=found.same,
        jaccard_other=found.different,
        jaccard_error=found.error,
        jaccard_found=found.found,
        jaccard_risk=float(alike.diagonal()[risky].mean()),
        jaccard_everyday=float(alike.diagonal()[~risky].mean()),
        cosine=near.same,
        cosine_other=near.different,
        cosine_found=near_apart.found,
    )


def candidates_by_language(
    candidates: Sequence[Candidate], queries: Sequence[Translated], fired: tuple[Bools, Bools]
) -> list[LanguageCandidate]:
    """One SAE's candidates, over the queries of the domains that each carries."""
    rows = []
    for candidate in candidates:
        domains = candidate.domains
        about = [query.domain in domains for query in queries]
        en, zh = (int(side[about, candidate.latent].sum()) for side in fired)
        rows.append(
            LanguageCandidate(
                sae=candidate.sae,
                hook_point=candidate.hook_point,
                latent=candidate.latent,
                domains=domains,
                queries=sum(about),
                en=en,
                zh=zh,
                language=language_of(np.array([en]), np.array([zh]), least=_LEAST)[0],
            )
        )
    return rows


def language_block(
    rows: Sequence[LanguageRow], tokens: Mapping[str, float], queries: int, compared: Collection[str]
) -> Block:
    """`tokens`: mean of a query, by language; `compared`: the SAEs of which layers are compared."""
    drawn_rows = [row for row in rows if row.sae in compared]
    panels = over_depth(
        drawn_rows,
        [
            Measure("the same query", lambda r: r.jaccard, colour=0),
            Measure("different queries", lambda r: r.jaccard_other, True, 0),
        ],
        "Jaccard",
    )
    near = over_depth(
        drawn_rows,
        [
            Measure("the same query", lambda r: r.cosine, colour=1),
            Measure("different queries", lambda r: r.cosine_other, True, 1),
        ],
        "cosine",
    )
    own = over_depth(
        drawn_rows,
        [
            Measure("by active latents", lambda r: r.jaccard_found, colour=0),
            Measure("by mean activation", lambda r: r.cosine_found, colour=1),
        ],
        "share found",
    )
    data = PlotData[LanguageRow](
        id="languages",
        title="The same queries in English and Chinese",
        caption="Queries and their translations, read apart: Jaccard overlap of the latents that fire anywhere in "
        "each; cosine of the mean activations (less the mean of both languages); and the share of English queries "
        "whose nearest Chinese one is their own translation (by chance 1 in "
        f"{queries}; for activations, less each language's own mean). A query has {tokens['en']:.0f} tokens in English "
        f"and {tokens['zh']:.0f} in Chinese on average, which alone keeps the overlap below 1.",
        n={"pairs of queries": queries, "SAEs": len(rows), "SAEs compared": len(drawn_rows)},
        finding=" ".join(_meeting(site, depths) for site, depths in by_site(drawn_rows).items()),
        rows=list(rows),
    )
    drawn = [
        ("Overlap of active latents", plots.lines(panels, key="jaccard", about="Overlap of active latents")),
        ("Likeness of activations", plots.lines(near, key="cosine", about="Likeness of activations")),
        ("Own translation found", plots.lines(own, key="own", about="Own translation found")),
    ]
    table = Table(
        ["SAE", "Jaccard", "others", "difference", "risk", "everyday", "cosine", "others", "found", "found by cosine"],
        [
            [
                r.sae,
                f"{r.jaccard:.3f}",
                f"{r.jaccard_other:.3f}",
                f"{r.jaccard - r.jaccard_other:.3f} ± {1.96 * r.jaccard_error:.3f}",
                f"{r.jaccard_risk:.3f}",
                f"{r.jaccard_everyday:.3f}",
                f"{r.cosine:.2f}",
                f"{r.cosine_other:.2f}",
                f"{r.jaccard_found:.0%}",
                f"{r.cosine_found:.0%}",
            ]
            for r in rows
        ],
    )
    return Block(data, drawn, [("By SAE (± is a 95% interval over queries)", table)])


def _meeting(site: str, depths: dict[int, list[LanguageRow]]) -> str:
    gaps = {depth: fmean(r.jaccard - r.jaccard_other for r in there) for depth, there in depths.items()}
    meet, part = max(gaps, key=lambda d: gaps[d]), min(gaps, key=lambda d: gaps[d])
    if len(gaps) == 1:
        return (
            f"{site}, layer {meet}: a translation shares {gaps[meet]:.3f} more of its latents than another query does."
        )
    after = [depth for depth in gaps if depth > meet]
    falls = f"; past it the difference falls to {min(gaps[d] for d in after):.3f}" if after else ""
    return (
        f"{site}: English and Chinese meet most at layer {meet} (a translation shares {gaps[meet]:.3f} more of its "
        f"latents than another query does) and are furthest apart at layer {part} ({gaps[part]:.3f}){falls}."
    )


def language_candidate_block(rows: Sequence[LanguageCandidate]) -> Block:
    points = hook_points(rows)
    counts = Counter((row.hook_point, row.language) for row in rows)
    parts = {_NAMES[kind]: [float(counts[point, kind]) for point in points] for kind in LANGUAGES}
    total = Counter(row.language for row in rows)
    judged = total["both"] + total["en"] + total["zh"]
    single = total["en"] + total["zh"]
    data = PlotData[LanguageCandidate](
        id="language_candidates",
        title="Candidates that fire in one language only",
        caption="Candidates of all SAEs of an output, on the queries of their own domains: they fire on at least "
        f"{_LEAST} in one language and on none of the same queries in the other, or in both. Those that fire on fewer "
        f"than {_LEAST} in either are not judged.",
        n={"candidates": len(rows), "judged": judged},
        finding=f"Of {judged:,} judged candidates, {total['en']:,} fire in English only, {total['zh']:,} in Chinese "
        f"only ({single / judged:.0%} together)."
        if judged
        else "No candidate fires often enough on these queries to be judged.",
        rows=list(rows),
    )
    one_sided = sorted((r for r in rows if r.language in {"en", "zh"}), key=lambda r: -max(r.en, r.zh))[:_SHOWN]
    table = Table(
        ["latent", "domains", "fires in", "queries", "English", "Chinese"],
        [
            [
                f"{place(r.hook_point).short}: {r.latent} ({r.sae})",
                ", ".join(r.domains),
                _NAMES[r.language],
                str(r.queries),
                str(r.en),
                str(r.zh),
            ]
            for r in one_sided
        ],
        3,
    )
    drawn = [("", plots.bars([place(p).short for p in points], parts, x="candidates", key="sided", about=data.title))]
    return Block(data, drawn, [("The most one-sided", table)] if one_sided else [])
