"""Rank: the SAEs of a suite by the pre-explanation metric, the configuration picked, the curve against sparsity.

A configuration is a site, an architecture, a width and an L0, at every depth. The rule of the pick: of the SAEs whose
latents are exact on a subset of rows (BatchTopK, JumpReLU; a TopK latent fires only if it is among the k largest of
all), those of the configurations that cover the most depths are ranked at each depth by the metric, and the
configuration with the best mean rank over the depths wins. One site and one L0 everywhere costs a little against the
best SAE of each depth (`best_by_depth`), and leaves less to chance.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel
from scipy.stats import rankdata

from guard.errors import InvalidInput
from guard.lab.search.contrast import ALL, THRESHOLDS, ConceptContrast
from guard.lab.suite.measure import SaeReport

EXACT = ("batch_topk", "jumprelu")
METRICS = ("i_cdf", "i_cdf_excess", "i_cdf_net", "i_cdf_sum", *(f"l0_{t:g}" for t in THRESHOLDS))
RESIDUAL = "residual"
_DRAWN = "0.2"  # the t of the L_{0,t} that is drawn
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
    l0: float
    fvu: float
    fvu_typical: float
    i_cdf: float
    i_cdf_reversed: float
    i_cdf_shuffled: float
    i_cdf_excess: float
    i_cdf_excess_null: float
    l0_at: dict[str, int]


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
    return [
        CurvePoint(
            sae=report.name,
            hook_point=report.hook_point,
            site=site(report.hook_point),
            depth=depth(report.hook_point),
            architecture=report.architecture,
            width=report.width,
            l0_target=report.l0_target,
            l0=report.l0,
            fvu=report.fvu,
            fvu_typical=report.fvu_typical,
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


def ranked(points: Sequence[CurvePoint], by: str = "i_cdf") -> Ranking:
    """Raises InvalidInput for a metric that is none of METRICS."""
    if by not in METRICS:
        raise InvalidInput(f"by: found {by!r}, expected one of {', '.join(METRICS)}")
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


def draw_curve(points: Sequence[CurvePoint], file: Path) -> None:
    """Interpretability against sparsity (left: I_CDF above, L_{0,t} below) beside reconstruction (right), as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")  # without pyplot: saved by Agg, no display, no global state
    axes = figure.subplot_mosaic([["i_cdf", "fvu"], ["l0_t", "fvu"]])
    panels: dict[str, tuple[str, Callable[[CurvePoint], float]]] = {
        "i_cdf": ("I_CDF (mean over latents)", lambda p: p.i_cdf),
        "l0_t": (f"$L_{{0,t}}$, t = {_DRAWN} (latents)", lambda p: p.l0_at[_DRAWN]),
        "fvu": ("FVU (share of variance not rebuilt)", lambda p: p.fvu_typical),
    }
    lines: dict[tuple[str, str, int], list[CurvePoint]] = {}
    for p in sorted(points, key=lambda p: (p.site != RESIDUAL, p.site, p.depth, p.architecture, p.width, p.l0)):
        lines.setdefault((p.hook_point, p.architecture, p.width), []).append(p)
    for name, (label, value) in panels.items():
        axis = axes[name]
        for line in lines.values():
            axis.plot([p.l0 for p in line], [value(p) for p in line], **line_style(line[0], points))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("L0 measured (latents a token)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes["i_cdf"].set_title("Interpretability")
    axes["fvu"].set_title("Reconstruction (typical tokens)")
    handles, labels = axes["fvu"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    figure.savefig(file, dpi=130)


def line_style(point: CurvePoint, among: Sequence[CurvePoint]) -> dict[str, Any]:
    """Colour by depth (viridis: safe for the colour-blind), marker by site, filling by architecture, size by width."""
    from matplotlib import colormaps

    viridis: Any = colormaps["viridis"]
    depths, sites = sorted({p.depth for p in among}), sorted({p.site for p in among}, key=lambda s: (s != RESIDUAL, s))
    widths = sorted({p.width for p in among})
    return {
        "color": viridis(0.9 * depths.index(point.depth) / max(len(depths) - 1, 1)),
        "marker": "os^Dv"[sites.index(point.site) % 5],
        "fillstyle": {"batch_topk": "full", "jumprelu": "none"}.get(point.architecture, "left"),
        "linestyle": {"batch_topk": "-", "jumprelu": "--"}.get(point.architecture, ":"),
        "markersize": 5 + 2 * widths.index(point.width),
        "label": f"{point.site} {point.depth}, {point.architecture}, {point.width:,}",
    }
