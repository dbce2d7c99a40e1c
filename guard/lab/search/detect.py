"""Does the metric predict? Detection by each SAE's latents alone, and its rank correlation with what is known of it.

Detection: the heads of guard.lab.heads.fit over the pooled strengths of one SAE's latents, chosen inside the fold;
whole groups of sources are held out together, in a few folds; the project's own sentences are only ever fitted on. The
contrast pairs, which the metric is made of, and the look-alikes are no part of it: neither chosen by, nor fitted on,
nor judged on.

Correlations: SAEs of one hook point share activations and are no independent witnesses, so the bootstrap draws whole
hook points, in the scope `depth` whole depths. There are few of them, and intervals from few draws are too narrow
rather than too wide.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from guard.lab.heads.evaluate import judging_sources
from guard.lab.heads.features import PooledTexts
from guard.lab.heads.fit import HEADS, Design, FitConfig, choose_latents, fit_head
from guard.lab.labelled import PAIRS, Row
from guard.lab.search.contrast import ALL
from guard.lab.search.rank import METRICS, CurvePoint, metric
from guard.lab.search.splits import split_groups, without_features

PREDICTORS = (*METRICS, "-fvu", "-fvu_typical", "l0")
RIVALS = ("-fvu_typical", "l0")  # what is known without any metric; a few outlier tokens make plain FVU small
_BOOTSTRAPS = 2000
_LEAST_UNITS = 3  # hook points, or depths: a draw from fewer says nothing

Interval = tuple[float, float]


@dataclass(frozen=True)
class DetectConfig:
    """A cheap setting: some seconds an SAE, and alike for all of them."""

    latents: int = 128  # that each head chooses; the heads of a domain use each other's
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
    """Spearman's over the SAEs; within depth (or hook point): of the ranks inside each over their number, pooled.

    Intervals: 95%, bootstrap over `units`, whole hook points or depths; None where they are too few.
    `over`: rho less the absolute rho of a rival, with its interval; empty where there is none.
    """

    target: str  # `*`: mean over heads; else a domain, by the metric over that domain's pairs
    scope: str
    predictor: str
    saes: int
    units: int
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
    """The fold of each group of sources that is judged, such that every head is judged in as many as may be.

    Groups that judge no head are in none: they are always fitted on.
    """
    design = without_features(rows)
    found = [
        (str(group), number)
        for number, head in enumerate(HEADS)
        for _, judged, _ in judging_sources(design, head)
        for group in np.unique(design.group[judged])
    ]
    return split_groups(found, count)


def detect(
    sae: str, rows: Sequence[Row], strength: NDArray[np.float16], folds: dict[str, int], config: DetectConfig
) -> Detection:
    """`rows` and `strength [N, d_sae]` without what `judged_rows` leaves out."""
    none = np.zeros((len(rows), 0), dtype=np.float32)
    setting = FitConfig(
        latents_per_head=config.latents,
        latents_by_weight=0,  # a scouting fit for each head and fold would take most of the time
        latents_by_contrast=0,
        latent_c=config.c,
        per_domain=(),
        iterations=config.iterations,
    )
    design = Design(rows, PooledTexts(np.ones(len(rows), dtype=np.int64), none, strength), setting)
    fold = np.array([folds.get(group, -1) for group in design.group])
    logits = {head: np.full(len(rows), np.nan) for head in HEADS}
    for number in sorted(set(folds.values())):
        used = fold != number
        chosen = choose_latents(design, used)
        for head in HEADS:
            y = design.targets[head]
            test = np.flatnonzero(~used & (y >= 0))
            if len(test) and len(np.unique(y[used & (y >= 0)])) == 2:
                logits[head][test] = fit_head(design, head, used, chosen[head[0]], "latents").logits(design, test)
    by_source: dict[str, dict[str, float]] = {}
    for head in HEADS:
        for source, judged, _ in judging_sources(design, head):
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
        x = np.array([[predicted(point, name) for point in found] for name in PREDICTORS])  # [P, n]
        level = np.unique([p.depth for p in found], return_inverse=True)[1]
        hook_point = np.unique([p.hook_point for p in found], return_inverse=True)[1]
        whole = np.zeros(len(found), dtype=np.int64)
        result += _scope(target, "suite", x, y, strata=whole, units=hook_point)
        result += _scope(target, "depth", x, y, strata=level, units=level)
        result += _scope(target, "hook point", x, y, strata=hook_point, units=hook_point)
    return result


def predicted(point: CurvePoint, name: str) -> float:
    """One of PREDICTORS."""
    if name.startswith("-"):
        return -float(getattr(point, name[1:]))
    return point.l0 if name == "l0" else metric(point, name)


def _scope(
    target: str,
    scope: str,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    *,
    strata: NDArray[np.int64],
    units: NDArray[np.int64],
) -> list[Correlation]:
    rho = rank_correlation(x, y, strata)
    count = len(np.unique(units))
    drawn = resampled(np.zeros(count, dtype=np.int64), _BOOTSTRAPS)  # [B, units]
    times = (drawn[:, :, None] == units).sum(axis=1)  # [B, n]
    again = correlations_of_draws(x, y, strata, times)  # [P, B]
    result = []
    for i, name in enumerate(PREDICTORS):
        known = bool(np.isfinite(rho[i]))
        judged = known and count >= _LEAST_UNITS
        over = {}
        for rival in RIVALS if judged else ():
            r = PREDICTORS.index(rival)
            if name != rival and np.isfinite(rho[r]):
                low, high = _interval(again[i] - np.abs(again[r]))
                over[rival] = (round(float(rho[i] - abs(rho[r])), 4), low, high)
        result.append(
            Correlation(
                target=target,
                scope=scope,
                predictor=name,
                saes=x.shape[1],
                units=count,
                rho=round(float(rho[i]), 4) if known else None,
                interval=_interval(again[i]) if judged else None,
                over=over,
            )
        )
    return result


def rank_correlation(x: NDArray[np.float64], y: NDArray[np.float64], strata: NDArray[np.int64]) -> NDArray[np.float64]:
    """Spearman's rho along the last axis; NaN where all are tied.

    Ranks are taken inside each stratum, centred, and divided by its size: one that holds more counts by its members,
    not by its longer ranks.
    """
    rx, ry = np.zeros(x.shape), np.zeros(y.shape)
    for stratum in np.unique(strata):
        inside = strata == stratum
        size = inside.sum()
        for given, ranks in ((x, rx), (y, ry)):
            ranks[..., inside] = (rankdata(given[..., inside], axis=-1) - (size + 1) / 2) / size
    return _cosine(rx, ry)


def correlations_of_draws(
    x: NDArray[np.float64], y: NDArray[np.float64], strata: NDArray[np.int64], times: NDArray[np.int64]
) -> NDArray[np.float64]:
    """`rank_correlation` of `x [P, n]` and `y [n]`, each member repeated as often as `times [B, n]` says: `[P, B]`."""
    together = strata[:, None] == strata
    size = np.maximum(times @ together, 1)  # [B, n]

    def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
        """`[B, n]`: those below less those above, over the size: twice the centred rank. Once a copy, by the root."""
        beats = np.sign(values[:, None] - values) * together  # [n, n]
        return np.asarray(times @ beats.T / size * np.sqrt(times))

    of_y = ranks(y)
    return np.stack([_cosine(ranks(line), of_y) for line in x])


def _cosine(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    scale = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((x * y).sum(axis=-1) / scale)


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
