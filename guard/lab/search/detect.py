"""Does the metric predict? Detection by each SAE's latents alone, and its rank correlation with what is known of it.

Detection: the heads of guard.lab.heads.fit over the pooled strengths of one SAE's latents, chosen inside the fold;
whole groups of sources are held out together, in a few folds. The contrast pairs, which the metric is made of, and the
look-alikes are no part of it: neither chosen by, nor fitted on, nor judged on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from guard.lab.heads.evaluate import _judged
from guard.lab.heads.features import PooledTexts
from guard.lab.heads.fit import HEADS, Design, FitConfig, choose_latents, fit_head
from guard.lab.labelled import Row
from guard.lab.search.contrast import ALL
from guard.lab.search.rank import METRICS, CurvePoint, line_style, metric
from guard.lab.search.splits import PAIRS, split_groups, without_features

PREDICTORS = (*METRICS, "-fvu", "-fvu_typical", "l0")
SCOPES = ("suite", "depth", "hook point")
_RIVALS = ("-fvu", "l0")
_BOOTSTRAPS = 2000

Interval = tuple[float, float]


@dataclass(frozen=True)
class DetectConfig:
    """A cheap setting: some seconds an SAE, and alike for all of them."""

    latents: int = 128  # of each head
    c: float = 2e-4
    iterations: int = 60
    folds: int = 5


class Detection(BaseModel):
    """AUROC of one SAE's latents on sources that were held out: mean over sources, then over heads."""

    sae: str
    auroc: float
    by_domain: dict[str, float]
    by_head: dict[str, float]
    by_source: dict[str, dict[str, float]]  # of each head


class Correlation(BaseModel):
    """Spearman's over the SAEs; within depth (or hook point): of the ranks inside each, pooled.

    Intervals: 95%, bootstrap over SAEs (those of one hook point share activations, which it does not know).
    `over`: rho less the absolute rho of a rival, with its interval.
    """

    target: str  # `*`: mean over heads; else a domain, by the metric over that domain's pairs
    scope: str
    predictor: str
    saes: int
    rho: float | None
    interval: Interval | None
    over: dict[str, tuple[float, float, float]]


class Prediction(BaseModel):
    """`prediction.json`."""

    latents: int
    c: float
    iterations: int
    folds: list[list[str]]  # the groups of sources held out together
    rows: int
    detections: list[Detection]
    correlations: list[Correlation]


def judged_rows(rows: Sequence[Row]) -> NDArray[np.int64]:
    return np.array([i for i, r in enumerate(rows) if r.source != PAIRS and not r.source.startswith("lookalike")])


def make_folds(rows: Sequence[Row], count: int) -> dict[str, int]:
    """The fold of each group of sources, such that every head has positives in as many folds as may be."""
    design = without_features(rows)
    found = [
        (str(group), number)
        for number, head in enumerate(HEADS)
        for group in np.unique(design.group[design.targets[head] == 1])
    ]
    folds = split_groups(found, count)
    return folds | {str(g): i % count for i, g in enumerate(sorted(set(design.group) - set(folds)))}


def detect(
    sae: str, rows: Sequence[Row], strength: NDArray[np.float16], folds: dict[str, int], config: DetectConfig
) -> Detection:
    """`rows` and `strength [N, d_sae]` without what `judged_rows` leaves out."""
    none = np.zeros((len(rows), 0), dtype=np.float32)
    setting = FitConfig(
        latents_per_head=config.latents,
        latents_by_contrast=0,
        latent_c=config.c,
        per_domain=(),
        iterations=config.iterations,
    )
    design = Design(rows, PooledTexts(np.ones(len(rows), dtype=np.int64), none, strength), setting)
    fold = np.array([folds[group] for group in design.group])
    logits = {head: np.full(len(rows), np.nan) for head in HEADS}
    for number in np.unique(fold):
        used = fold != number
        chosen = choose_latents(design, used)
        for head in HEADS:
            y = design.targets[head]
            test = np.flatnonzero(~used & (y >= 0))
            if len(test) and len(np.unique(y[used & (y >= 0)])) == 2:
                logits[head][test] = fit_head(design, head, used, chosen[head[0]], "latents").logits(design, test)
    by_source: dict[str, dict[str, float]] = {}
    for head in HEADS:
        for source, judged, _ in _judged(design, head):
            scores = logits[head][judged]
            if not np.isnan(scores).any():
                name = f"{head[0]}.{head[1].value}"
                found = round(float(roc_auc_score(design.targets[head][judged], scores)), 5)
                by_source.setdefault(name, {})[source] = found
    by_head = {name: float(np.mean(list(found.values()))) for name, found in by_source.items()}
    domains = dict.fromkeys(name.split(".")[0] for name in by_head)
    by_domain = {d: float(np.mean([v for n, v in by_head.items() if n.split(".")[0] == d])) for d in domains}
    auroc = float(np.mean(list(by_head.values())))
    return Detection(sae=sae, auroc=auroc, by_domain=by_domain, by_head=by_head, by_source=by_source)


def correlations(points: Mapping[str, Sequence[CurvePoint]], detections: Sequence[Detection]) -> list[Correlation]:
    """Every predictor in every scope. `points`: of the suite by target, in the order of the detections."""
    result = []
    for target, found in points.items():
        y = np.array([d.auroc if target == ALL else d.by_domain[target] for d in detections])
        x = np.array([[_predictor(point, name) for point in found] for name in PREDICTORS])  # [P, n]
        strata = {
            "suite": np.zeros(len(found), dtype=np.int64),
            "depth": np.unique([p.depth for p in found], return_inverse=True)[1],
            "hook point": np.unique([p.hook_point for p in found], return_inverse=True)[1],
        }
        for scope in SCOPES:
            result += _scope(target, scope, x, y, strata[scope])
    return result


def _predictor(point: CurvePoint, name: str) -> float:
    if name.startswith("-"):
        return -float(getattr(point, name[1:]))
    return point.l0 if name == "l0" else metric(point, name)


def _scope(
    target: str, scope: str, x: NDArray[np.float64], y: NDArray[np.float64], strata: NDArray[np.int64]
) -> list[Correlation]:
    rho = rank_correlation(x, y, strata)
    drawn = resampled(strata, _BOOTSTRAPS)  # [B, n]
    again = np.stack([rank_correlation(line[drawn], y[drawn], strata) for line in x])  # [P, B]
    result = []
    for i, name in enumerate(PREDICTORS):
        over = {}
        for rival in _RIVALS:
            r = PREDICTORS.index(rival)
            if name != rival and np.isfinite([rho[i], rho[r]]).all():
                low, high = _interval(again[i] - np.abs(again[r]))
                over[rival] = (round(float(rho[i] - abs(rho[r])), 4), low, high)
        known = bool(np.isfinite(rho[i]))
        result.append(
            Correlation(
                target=target,
                scope=scope,
                predictor=name,
                saes=x.shape[1],
                rho=round(float(rho[i]), 4) if known else None,
                interval=_interval(again[i]) if known else None,
                over=over,
            )
        )
    return result


def rank_correlation(x: NDArray[np.float64], y: NDArray[np.float64], strata: NDArray[np.int64]) -> NDArray[np.float64]:
    """Spearman's rho along the last axis; ranks are taken, and centred, inside each stratum. NaN where all are tied."""
    rx, ry = np.zeros(x.shape), np.zeros(y.shape)
    for stratum in np.unique(strata):
        inside = strata == stratum
        for given, ranks in ((x, rx), (y, ry)):
            ranks[..., inside] = rankdata(given[..., inside], axis=-1) - (inside.sum() + 1) / 2
    scale = np.sqrt((rx**2).sum(axis=-1) * (ry**2).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((rx * ry).sum(axis=-1) / scale)


def resampled(strata: NDArray[np.int64], times: int, seed: int = 0) -> NDArray[np.int64]:
    """Places drawn with replacement inside each stratum, `[times, n]`."""
    rng = np.random.default_rng(seed)
    result = np.zeros((times, len(strata)), dtype=np.int64)
    for stratum in np.unique(strata):
        inside = np.flatnonzero(strata == stratum)
        result[:, inside] = rng.choice(inside, size=(times, len(inside)))
    return result


def _interval(values: NDArray[np.float64]) -> Interval:
    finite = values[np.isfinite(values)]
    low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (np.nan, np.nan)
    return round(float(low), 4), round(float(high), 4)


def draw_prediction(points: Sequence[CurvePoint], prediction: Prediction, file: Path) -> None:
    """Detection against I_CDF, its excess, FVU and L0: one dot an SAE."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")  # without pyplot: saved by Agg, no display, no global state
    auroc = {d.sae: d.auroc for d in prediction.detections}
    found = {c.predictor: c for c in prediction.correlations if (c.target, c.scope) == (ALL, "suite")}
    panels: tuple[tuple[str, str], ...] = (
        ("i_cdf", "I_CDF"),
        ("i_cdf_excess", "I_CDF, forward less backward"),
        ("-fvu", "-FVU"),
        ("l0", "L0 measured"),
    )
    shown: dict[str, Any] = {}
    for axis, (name, label) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for point in points:
            style = line_style(point, points) | {"linestyle": "none"}
            style["label"] = style["label"].split(",")[0]
            (dot,) = axis.plot(_predictor(point, name), auroc[point.sae], **style)
            shown.setdefault(style["label"], dot)
        axis.set_xlabel(label)
        axis.set_ylabel("AUROC on unseen sources")
        axis.grid(alpha=0.3)
        c = found[name]
        if c.rho is not None and c.interval is not None:
            axis.set_title(f"Spearman {c.rho:+.2f} [{c.interval[0]:+.2f}, {c.interval[1]:+.2f}]")
    figure.legend(list(shown.values()), list(shown), loc="outside right center", fontsize="small")
    figure.savefig(file, dpi=130)
