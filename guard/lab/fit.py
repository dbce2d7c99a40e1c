"""Fit: which latents each domain keeps, and the heads over them.

features   latents: pooled activations of the chosen latents; dense: mean activations; both scaled to unit variance
model      logistic regression, L2, signed; every source counts alike, so that no source's quirks rule
columns    probe (dense only), latents, combined (both); the combined head is what ships
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from guard.lab.features import Floats, PooledTexts
from guard.lab.labelled import DOMAINS, Row, target
from guard.records import HeadKind

Bools = NDArray[np.bool_]

Head = tuple[str, HeadKind]

# Politics has no harm head: no source labels harmful politics apart from mere politics.
HEADS: tuple[Head, ...] = (
    ("pornography", HeadKind.HARM),
    ("pornography", HeadKind.PRESENCE),
    ("politics", HeadKind.PRESENCE),
    ("violence", HeadKind.HARM),
    ("violence", HeadKind.PRESENCE),
    ("terror", HeadKind.HARM),
    ("terror", HeadKind.PRESENCE),
)

WEAK_WEIGHT = 0.3  # rows with a noisy mapping
_LEAST_TEXTS = 20  # a latent that fires in fewer texts is never chosen


@dataclass(frozen=True)
class FitConfig:
    """How many latents are kept and how strongly weights are held back; chosen across sources (docs/science.md)."""

    latents_per_head: int = 192
    latents_by_contrast: int = 48
    latent_c: float = 0.02
    dense_c: float = 0.001
    pooling: str = "clip"
    exponent: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Linear:
    """`logit = bias + pooled[latents] @ latent_weights + dense @ dense_weights`, in the units of the features."""

    latents: NDArray[np.int64]  # [k] numbered through the suite
    latent_weights: NDArray[np.float64]  # [k]
    dense_weights: NDArray[np.float64]  # [D]
    bias: float

    def logits(self, design: "Design", rows: NDArray[np.int64]) -> NDArray[np.float64]:
        pooled = design.latents[np.ix_(rows, self.latents)]
        return np.asarray(pooled @ self.latent_weights + design.dense[rows] @ self.dense_weights + self.bias)


class Design:
    """Rows, targets and features of everything that heads are fitted on and judged by."""

    def __init__(self, rows: Sequence[Row], pooled: PooledTexts, config: FitConfig) -> None:
        self.rows = list(rows)
        self.config = config
        raw = pooled.clip if config.pooling == "clip" else pooled.fire
        length = np.maximum(pooled.tokens, 1).astype(np.float32)[:, None]
        self.latents: Floats = raw.astype(np.float32)  # [N, K]
        if config.exponent != 1.0:
            self.latents *= length ** (1.0 - config.exponent)
        self.dense = pooled.mean
        self.fires = pooled.fire > 0  # [N, K]
        self.spread = np.maximum(self.latents.std(axis=0), 1e-6)  # [K]
        self.alive = self.fires.sum(axis=0) >= _LEAST_TEXTS  # [K]
        self.source = np.array([row.source for row in self.rows])
        self.group = np.array([row.group for row in self.rows])
        self.weak = np.array([row.weak for row in self.rows])
        self.targets = {head: self._targets(*head) for head in HEADS}

    def _targets(self, domain: str, head: HeadKind) -> NDArray[np.int8]:
        """`[N]`: 1, 0, or -1 where the row's source cannot tell."""
        found = [target(row, domain, head) for row in self.rows]
        return np.array(
            [
                -1 if t is None or r.source.startswith("lookalike") else int(t)
                for t, r in zip(found, self.rows, strict=True)
            ],
            dtype=np.int8,
        )

    def weights(self, y: NDArray[np.int8], used: Bools) -> NDArray[np.float64]:
        """Sample weights: sources alike (by the root of their size), both classes alike in sum."""
        weights = np.where(self.weak, WEAK_WEIGHT, 1.0) * used
        for value in (0, 1):
            chosen = used & (y == value)
            for source in np.unique(self.source[chosen]):
                part = chosen & (self.source == source)
                weights[part] /= np.sqrt(part.sum())
            if weights[chosen].sum():
                weights[chosen] /= weights[chosen].sum()
        return weights * used.sum() / 2


def contrast_scores(design: Design, used: Bools) -> dict[str, Floats]:
    """`p_f` of every latent by domain, over the project's own pairs (see guard.lab.contrast)."""
    place = {row.id: i for i, row in enumerate(design.rows) if row.source == "own_pairs" and used[i]}
    if not place:
        return {}  # the pairs themselves are held out
    result = {}
    for domain in DOMAINS:
        ids = [key.removesuffix("/with") for key in place if key.startswith(f"{domain}/") and key.endswith("/with")]
        with_ = design.fires[[place[f"{i}/with"] for i in ids]]
        without = design.fires[[place[f"{i}/without"] for i in ids]]
        result[domain] = ((with_ & ~without).mean(axis=0) - (without & ~with_).mean(axis=0)).astype(np.float32)
    return result


def separations(design: Design, used: Bools) -> dict[Head, Floats]:
    """By head: how many standard deviations apart positives and negatives lie, for each latent, `[K]`."""
    sides = []
    for head in HEADS:
        y = design.targets[head]
        weights = design.weights(y, used & (y >= 0))
        for value in (1, 0):
            side = np.where(y == value, weights, 0.0)
            sides.append(side / max(side.sum(), 1e-12))
    means = np.stack(sides).astype(np.float32) @ design.latents  # [2 * heads, K]; one pass over the big matrix
    return {
        head: np.where(design.alive, (means[2 * i] - means[2 * i + 1]) / design.spread, 0.0).astype(np.float32)
        for i, head in enumerate(HEADS)
    }


def choose_latents(design: Design, used: Bools) -> dict[str, NDArray[np.int64]]:
    """The latents of each domain: those that part its labelled texts best, and those that its contrast pairs name."""
    config = design.config
    by_contrast = contrast_scores(design, used)
    by_label = separations(design, used)
    result = {}
    for domain in DOMAINS:
        chosen: set[int] = set()
        if by_contrast:
            chosen.update(np.argsort(-by_contrast[domain])[: config.latents_by_contrast].tolist())
        for head in [h for h in HEADS if h[0] == domain]:
            chosen.update(np.argsort(-np.abs(by_label[head]))[: config.latents_per_head].tolist())
        result[domain] = np.array(sorted(chosen), dtype=np.int64)
    return result


def fit_linear(
    latents: Floats | None,
    dense: Floats | None,
    y: NDArray[np.int8],
    weights: NDArray[np.float64],
    config: FitConfig,
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Weights of the latents, of the dense features, and the bias, in raw units. Either part may be None."""
    parts = []
    # Features of unit variance times sqrt(C) with an L2 penalty of 1: each part has a strength of its own.
    for x, c in ((latents, config.latent_c), (dense, config.dense_c)):
        if x is not None:
            centre, spread = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
            parts.append((x, centre, np.sqrt(c) / spread))
    z = np.concatenate([(x - centre) * scale for x, centre, scale in parts], axis=1)
    model = LogisticRegression(C=1.0, max_iter=100, tol=1e-3)
    model.fit(z, y, sample_weight=weights)
    bias = float(model.intercept_[0])
    found, column = [], 0
    for _x, centre, scale in parts:
        w = model.coef_[0][column : column + len(scale)] * scale
        bias -= float(w @ centre)
        found.append(w.astype(np.float64))
        column += len(scale)
    none = np.zeros(0)
    return (found[0] if latents is not None else none), (found[-1] if dense is not None else none), bias


def fit_head(design: Design, head: Head, used: Bools, chosen: NDArray[np.int64], column: str) -> Linear:
    """Fits one head on the rows `used`. `column`: `probe`, `latents` or `combined`."""
    y = design.targets[head]
    rows = np.flatnonzero(used & (y >= 0))
    weights = design.weights(y, used & (y >= 0))[rows]
    latents = design.latents[np.ix_(rows, chosen)] if column != "probe" else None
    dense = design.dense[rows] if column != "latents" else None
    w_latent, w_dense, bias = fit_linear(latents, dense, y[rows], weights, design.config)
    none = np.zeros(0, dtype=np.int64)
    return Linear(
        latents=chosen if latents is not None else none,
        latent_weights=w_latent,
        dense_weights=w_dense if dense is not None else np.zeros(design.dense.shape[1]),
        bias=bias,
    )


def calibrate(logits: NDArray[np.float64], y: NDArray[np.int8], weights: NDArray[np.float64]) -> tuple[float, float]:
    """Temperature and shift that make `sigmoid((logit + shift) / temperature)` a probability (weighted likelihood)."""

    def loss(parameters: NDArray[np.float64]) -> float:
        z = (logits + parameters[1]) / np.exp(parameters[0])
        return float((weights * (np.logaddexp(0, z) - y * z)).sum() / weights.sum())

    found = minimize(loss, np.zeros(2), method="Nelder-Mead")
    return float(np.exp(found.x[0])), float(found.x[1])
