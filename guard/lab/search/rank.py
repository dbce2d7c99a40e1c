"""Rank: the SAEs of a suite by the pre-explanation metric, and the configuration picked.

A configuration is a site, an architecture, a width and an L0, at every depth. The rule of the pick: of the SAEs whose
latents are exact on a subset of rows (BatchTopK, JumpReLU; a TopK latent fires only if it is among the k largest of
all), those of the configurations that cover the most depths are ranked at each depth by the metric, and the
configuration with the best mean rank over the depths wins. One site and one L0 everywhere costs a little against the
best SAE of each depth (`best_by_depth`), and leaves less to chance.
"""

import re
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel
from scipy.stats import rankdata

from guard.errors import InvalidInput
from guard.lab.search.contrast import ALL, THRESHOLDS, ConceptContrast
from guard.lab.suite.measure import SaeReport

EXACT = ("batch_topk", "jumprelu")
METRICS = ("p_best", "i_cdf", "i_cdf_excess", "i_cdf_net", "i_cdf_sum", *(f"l0_{t:g}" for t in THRESHOLDS))
BEST = "p_best"  # of these the best predictor of detection, over the search suite (docs/search.md)
RESIDUAL = "residual"
_CONTRASTED = {"i_cdf", "i_cdf_reversed", "i_cdf_shuffled", "i_cdf_excess", "i_cdf_excess_null", "l0_at"}


class CurvePoint(BaseModel):
    """One SAE of `curve.json`: what it rebuilds and what it tells apart, over all pairs (or one domain's)."""

    sae: str
    hook_point: str
    site: str
    depth: int
    architecture: str
    width: int
    l0_target: float | None
    tokens_trained: int
    l0: float
    fvu: float
    fvu_typical: float
    i_cdf: float
    i_cdf_reversed: float
    i_cdf_shuffled: float
    i_cdf_excess: float
    i_cdf_excess_null: float
    l0_at: dict[str, int]
    p_best: float  # mean over the sub-domains of the highest p_f there: how surely some latent tells each concept


class Configuration(BaseModel):
    site: str
    architecture: str
    width: int
    l0_target: float | None
    depths: list[int]
    mean_rank: float  # 1 is best
    saes: list[str]  # one a depth


class Ranking(BaseModel):
    """`ranking.json`: the suite by one metric, best first, and what was picked (None: no SAE is exact on subsets)."""

    by: str
    saes: list[str]
    picked: Configuration | None
    configurations: list[Configuration]
    best_by_depth: dict[int, str]


def depth(hook_point: str) -> int:
    """The number of the layer, or 0 where the name holds none."""
    found = re.search(r"\d+", hook_point)
    return int(found[0]) if found else 0


def site(hook_point: str) -> str:
    """What stands behind the layer's number: `mlp.down_proj`; the layer itself is the residual stream behind it."""
    _, _, rest = re.sub(r"\.\d+", "\0", hook_point, count=1).partition("\0")
    return rest.strip(".") or RESIDUAL


def curve(reports: Sequence[SaeReport], contrasts: Sequence[ConceptContrast], domain: str = ALL) -> list[CurvePoint]:
    """The points of a suite over all pairs, or over those of one domain."""
    found = {c.sae: c for c in contrasts if (c.domain, c.subdomain) == (domain, ALL)}
    best: dict[str, list[float]] = {}
    for c in contrasts:
        if c.subdomain != ALL and domain in {ALL, c.domain}:
            best.setdefault(c.sae, []).append(c.best_p[0])
    return [
        CurvePoint(
            sae=report.name,
            hook_point=report.hook_point,
            site=site(report.hook_point),
            depth=depth(report.hook_point),
            architecture=report.architecture,
            width=report.width,
            l0_target=report.l0_target,
            tokens_trained=report.tokens_trained,
            l0=report.l0,
            fvu=report.fvu,
            fvu_typical=report.fvu_typical,
            p_best=float(np.mean(best[report.name])),
            **found[report.name].model_dump(include=_CONTRASTED),
        )
        for report in reports
    ]


def metric(point: CurvePoint, name: str) -> float:
    """One of METRICS. `i_cdf_net`: excess less its null; `i_cdf_sum`: I_CDF times width, latents that part one pair."""
    if name.startswith("l0_"):
        return float(point.l0_at[name.removeprefix("l0_")])
    if name == "i_cdf_net":
        return point.i_cdf_excess - point.i_cdf_excess_null
    if name == "i_cdf_sum":
        return point.i_cdf * point.width
    return float(getattr(point, name))


def check_metric(name: str) -> None:
    """Raises InvalidInput for a metric that is none of METRICS."""
    if name not in METRICS:
        raise InvalidInput(f"by: found {name!r}, expected one of {', '.join(METRICS)}")


def ranked(points: Sequence[CurvePoint], by: str = BEST) -> Ranking:
    """By one of METRICS."""
    exact = [p for p in points if p.architecture in EXACT]
    groups: dict[tuple[str, str, int, float | None], dict[int, CurvePoint]] = {}
    for p in exact:
        groups.setdefault((p.site, p.architecture, p.width, p.l0_target), {})[p.depth] = p
    most = max((len(group) for group in groups.values()), default=0)
    groups = {key: group for key, group in groups.items() if len(group) == most}
    ranks: dict[str, float] = {}
    for level in {d for group in groups.values() for d in group}:
        rivals = [group[level] for group in groups.values() if level in group]
        places = rankdata([-metric(p, by) for p in rivals])
        ranks |= {p.sae: float(place) for p, place in zip(rivals, places, strict=True)}
    configurations = sorted(
        (
            Configuration(
                site=key[0],
                architecture=key[1],
                width=key[2],
                l0_target=key[3],
                depths=sorted(group),
                mean_rank=float(np.mean([ranks[p.sae] for p in group.values()])),
                saes=[group[d].sae for d in sorted(group)],
            )
            for key, group in groups.items()
        ),
        key=lambda c: c.mean_rank,
    )
    best: dict[int, CurvePoint] = {}
    for p in sorted(exact, key=lambda p: (p.depth, -metric(p, by))):
        best.setdefault(p.depth, p)
    return Ranking(
        by=by,
        saes=[p.sae for p in sorted(points, key=lambda p: -metric(p, by))],
        picked=configurations[0] if configurations else None,
        configurations=configurations,
        best_by_depth={level: p.sae for level, p in best.items()},
    )
