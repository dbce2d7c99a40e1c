"""Fit: which latents each domain keeps, and the heads over them.

features   latents: pooled activations of the chosen latents; dense: mean activations; scaled half way to unit spread
model      logistic regression, L2, signed; a source counts by the root of its size, so that no large one rules
columns    probe (dense only), latents, combined (a mix of the logits of these two); the combined head is what ships
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from guard.errors import InvalidInput
from guard.lab.annotated import EXCERPTS
from guard.lab.heads.features import Floats, PooledTexts
from guard.lab.heads.passages import Passages
from guard.lab.labelled import ANNOTATED, DOMAINS, LONG, PAIRS, Row, pairs, target
from guard.lab.search.contrast import firing_difference, pair_rows
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
# Own sentences of the first three plans are bare ones. Who asks for what, or does it, shows in dialogues, threads and
# elaborate prompts, which came with the fourth: harm is learned from those first, what a text is about from all.
EARLIER_WEIGHT = 0.2
_EARLIER = tuple(f"own_sentences_{plan}" for plan in ("first", "second", "third"))
# Our own long texts calibrate every head; those of these domains alone are fitted to them: others rank worse then.
_FITTED = {LONG: ("violence",)}
PROSE = tuple(ANNOTATED + name for name in EXCERPTS)  # judges thresholds, and has no say in them
_SCOUTED = 5000  # latents among which weights are compared
_SCOUT_ITERATIONS = 40
_LEAST_TEXTS = 20  # a latent that fires in fewer texts is never chosen
_SURE = 1.645  # standard deviations below what was seen: a latent's purity is as much at least, 95 times of 100


@dataclass(frozen=True)
class Choice:
    """How many latents a head keeps that part its texts best alone, and that weigh most among many; C of the fit."""

    by_separation: int
    by_weight: int
    c: float


@dataclass(frozen=True)
class FitConfig:
    """How many latents are kept and how strongly weights are held back; chosen across sources."""

    latents_per_head: int = 128
    latents_by_weight: int = 200
    latents_by_contrast: int = 32
    latents_by_purity: int = 0
    latent_c: float = 2e-4
    # DOMAIN=PER_HEAD,BY_WEIGHT,C in place of the three
    per_domain: tuple[str, ...] = ("pornography=0,300,1e-3", "politics=0,300,1e-3", "terror=300,400,1e-3")
    dense_c: float = 1e-3
    iterations: int = 100
    exponent: float = 0.5
    power: float = 0.5
    prior_tokens: float = 0.0
    passage_tokens: int = 0  # longer texts are judged, not fitted on, by their passages too; 0: as wholes alone
    passage_caution: float = 0.0  # each of n passages is held back by it times ln(n)
    # Sources that heads are fitted and calibrated on, beside the project's own sentences; all where there is none.
    sources: tuple[str, ...] = ()
    least_score: float = 0.2  # of an explanation, where heads keep to explained latents

    def of_domain(self, domain: str) -> Choice:
        """Raises InvalidInput for an override that is none."""
        for override in self.per_domain:
            found = re.fullmatch(r"(\w+)=(\d+),(\d+),([\d.e+-]+)", override)
            if not found or found[1] not in DOMAINS:
                raise InvalidInput(
                    f"per_domain: found {override!r}, expected DOMAIN=PER_HEAD,BY_WEIGHT,C such as terror=300,400,1e-3"
                )
            if found[1] == domain:
                return Choice(int(found[2]), int(found[3]), float(found[4]))
        return Choice(self.latents_per_head, self.latents_by_weight, self.latent_c)


@dataclass(frozen=True)
class Linear:
    """`logit = bias + pooled[latents] @ latent_weights + dense @ dense_weights`, in the units of the features.

    `dense` is what a text's mean activation differs by from `Design.centre`.
    """

    latents: NDArray[np.int64]  # [k] numbered through the suite
    latent_weights: NDArray[np.float64]  # [k]
    dense_weights: NDArray[np.float64]  # [D]
    bias: float

    def logits(self, design: "Design", rows: NDArray[np.int64]) -> NDArray[np.float64]:
        pooled = design.latents[np.ix_(rows, design.places(self.latents))]
        return np.asarray(pooled @ self.latent_weights + design.dense[rows] @ self.dense_weights + self.bias)

    def passage_logits(self, design: "Design", rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """`[M]`: of the passages of these rows; NaN for the others."""
        result = np.full(len(design.passage_text), np.nan)
        which = np.flatnonzero(np.isin(design.passage_text, rows))
        pooled = design.passage_latents[np.ix_(which, design.places(self.latents))]
        result[which] = pooled @ self.latent_weights + design.passage_dense[which] @ self.dense_weights + self.bias
        return result


class Design:
    """Rows, targets and features of everything that heads are fitted on and judged by."""

    def __init__(
        self,
        rows: Sequence[Row],
        pooled: PooledTexts,
        config: FitConfig,
        allowed: Bools | None = None,
        passages: Passages | None = None,
    ) -> None:
        """`allowed [K]`: the latents that a head may keep; None allows all.

        `pooled` and `passages` hold the A latents that are allowed, and no others.
        """
        self.rows = list(rows)
        self.config = config
        self.latents: Floats = pooled.strength.astype(np.float32)  # [N, A], gigabytes: changed where it lies
        weight = self._pooled(self.latents, pooled.tokens)
        self.fires = pooled.strength > 0  # [N, A]
        self.spread = np.maximum(self.latents.std(axis=0), 1e-6)  # [A]
        self.alive = self.fires.sum(axis=0) >= _LEAST_TEXTS  # [A]
        self.source = np.array([row.source for row in self.rows])
        self.group = np.array([row.group for row in self.rows])
        self.weak = np.array([row.weak for row in self.rows])
        self.in_chat = np.array([row.in_chat for row in self.rows])
        self.lookalike = np.array([row.source.startswith("lookalike") for row in self.rows])  # kept for judging
        licensed = np.array([row.own or not config.sources or row.source in config.sources for row in self.rows])
        self.prose = np.isin(self.source, PROSE)  # likewise
        self.usable = licensed & ~self.lookalike & ~self.prose  # [N] rows to calibrate on
        # Heads fitted to texts in chats too tell worse (docs/decisions/0006): those only calibrate.
        self.fitted_on = self.usable & ~self.in_chat  # [N] rows to choose and fit on
        # Probes read how a text differs from the average one: else all texts would share a large part of their logits.
        self.centre: Floats = pooled.mean[self.fitted_on].mean(axis=0)  # [D]
        self.dense: Floats = (pooled.mean - self.centre) * weight  # [N, D]
        self.targets = {head: self._targets(*head) for head in HEADS}
        # [A] by their numbers through the suite
        self.allowed = np.arange(len(self.alive)) if allowed is None else np.flatnonzero(allowed)
        self.passage_text = np.zeros(0, dtype=np.int64)  # [M] the row that each is of
        self.passage_latents = np.zeros((0, len(self.allowed)), dtype=np.float32)  # [M, A]
        self.passage_dense = np.zeros((0, self.dense.shape[1]), dtype=np.float32)  # [M, D]
        if passages is not None:
            self.passage_text, self.passage_latents = passages.text, passages.strength
            weight = self._pooled(self.passage_latents, passages.tokens)
            self.passage_dense = (passages.mean - self.centre) * weight

    def _pooled(self, strength: Floats, tokens: NDArray[np.int64]) -> Floats:
        """Turns mean strengths into pooled activations where they lie; returns what a mean direction is worth."""
        count = np.maximum(tokens, 1).astype(np.float32)[:, None]
        length = count + np.float32(self.config.prior_tokens)
        strength *= count / length ** np.float32(self.config.exponent)
        np.power(strength, np.float32(self.config.power), out=strength)
        return count / length

    def places(self, latents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where latents, by their numbers through the suite, stand among those that are allowed."""
        return np.searchsorted(self.allowed, latents)

    def severest(self, whole: NDArray[np.float64], passages: NDArray[np.float64]) -> NDArray[np.float64]:
        """`[N]` logits of texts and `[M]` of passages -> the most that each text has, `[N]` (guard.scoring.phase).

        Raises InvalidInput where these are passages of another size.
        """
        if len(passages) != len(self.passage_text):
            raise InvalidInput(
                f"found logits of {len(passages)} passages, expected {len(self.passage_text)}: run `guard lab fit` anew"
            )
        result = whole.copy()
        count = np.bincount(self.passage_text, minlength=len(whole))[self.passage_text]
        np.fmax.at(result, self.passage_text, passages - self.config.passage_caution * np.log(count))
        return result

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

    def taught_by(self, head: Head, used: Bools) -> Bools:
        """Those of `used` that the head is fitted to, by their labels and by `_FITTED`."""
        silent = [name for name, domains in _FITTED.items() if head[0] not in domains]
        return used & (self.targets[head] >= 0) & ~np.isin(self.source, silent)

    def weights(self, head: Head, used: Bools) -> NDArray[np.float64]:
        """Sample weights `[N]`: sources alike (by the root of their size), both classes alike in sum."""
        y = self.targets[head]
        used = self.taught_by(head, used)
        weak, earlier = self.weak, np.zeros(len(self.rows), dtype=bool)
        if head[1] is HeadKind.HARM:
            earlier = np.isin(self.group, _EARLIER)
            # What a pair says of harm is noisy: half of its texts wish or ask for it, the others speak about it.
            weak = weak | (self.source == PAIRS)
        weights = np.where(weak, WEAK_WEIGHT, 1.0) * used
        plan = np.where(earlier, EARLIER_WEIGHT, 1.0)
        for value in (0, 1):
            chosen = used & (y == value)
            for source in np.unique(self.source[chosen]):
                part = chosen & (self.source == source)
                weights[part] *= plan[part] / np.sqrt(part.sum())
            if weights[chosen].sum():
                weights[chosen] /= weights[chosen].sum()
        result: NDArray[np.float64] = weights * (used.sum() / 2)
        return result


def contrast_scores(design: Design, used: Bools) -> dict[str, Floats]:
    """`p_f` less `p_f` reversed `[A]` by domain, over the project's own pairs; none where they are held out.

    See guard.lab.search.contrast. Raises InvalidInput where some of the pairs are missing.
    """
    if not (used & (design.source == PAIRS)).any():
        return {}
    result = {}
    for domain in DOMAINS:
        with_, without = pair_rows(design.rows, [pair for pair in pairs() if pair.domain == domain])
        forward, backward = firing_difference(design.fires[with_], design.fires[without])
        result[domain] = forward - backward
    return result


def separations(design: Design, used: Bools) -> dict[Head, Floats]:
    """By head: how many standard deviations apart positives and negatives lie, for each latent, `[A]`."""
    sides = []
    for head in HEADS:
        y = design.targets[head]
        weights = design.weights(head, used)
        for value in (1, 0):
            side = np.where(y == value, weights, 0.0)
            sides.append(side / max(side.sum(), 1e-12))
    means = np.stack(sides).astype(np.float32) @ design.latents  # [2 * heads, A]; one pass over the big matrix
    return {
        head: np.where(design.alive, (means[2 * i] - means[2 * i + 1]) / design.spread, 0.0).astype(np.float32)
        for i, head in enumerate(HEADS)
    }


def purities(design: Design, used: Bools) -> dict[str, Floats]:
    """By domain: of the texts in which a latent fires, the share that is about the domain, at least, `[A]`.

    Both classes count alike in sum, so that .5 is chance; the lower end of Wilson's interval, so that a latent which
    fires seldom has to be purer.
    """
    result = {}
    for domain in DOMAINS:
        head = (domain, HeadKind.PRESENCE)
        y, weights = design.targets[head], design.weights(head, used)
        told = np.stack([weights * (y == 1), weights * (y == 0), design.taught_by(head, used)]).astype(np.float32)
        blocks = np.array_split(np.arange(len(design.alive)), max(1, len(design.alive) // _SCOUTED))
        about, other, texts = np.concatenate([told @ design.fires[:, block] for block in blocks], axis=1)
        share, n = about / np.maximum(about + other, 1e-12), np.maximum(texts, 1)
        middle, spread = share + _SURE**2 / (2 * n), _SURE * np.sqrt(share * (1 - share) / n + _SURE**2 / (4 * n * n))
        result[domain] = np.where(design.alive, (middle - spread) / (1 + _SURE**2 / n), 0.0).astype(np.float32)
    return result


def choose_latents(design: Design, used: Bools) -> dict[str, NDArray[np.int64]]:
    """The latents of each domain, for both of its heads.

    Those that part its labelled texts best, each alone; those that weigh most in a fit over many, which sees what one
    adds to the others; those that its contrast pairs name; and those that fire in its texts and in few others.
    """
    config = design.config
    by_contrast = contrast_scores(design, used)
    by_label = separations(design, used)
    by_purity = purities(design, used) if config.latents_by_purity else {}
    result = {}
    for domain in DOMAINS:
        chosen: set[int] = set()
        if by_contrast:
            told = np.where(design.alive, by_contrast[domain], -np.inf)
            order = np.argsort(-told)[: config.latents_by_contrast]
            chosen.update(order[told[order] > 0].tolist())
        if by_purity:
            order = np.argsort(-by_purity[domain])[: config.latents_by_purity]
            chosen.update(order[by_purity[domain][order] > 0].tolist())
        wanted = config.of_domain(domain)
        for head in [h for h in HEADS if h[0] == domain]:
            order = np.argsort(-np.abs(by_label[head]))
            order = order[design.alive[order]]
            chosen.update(order[: wanted.by_separation].tolist())
            if wanted.by_weight:
                chosen.update(_weightiest(design, head, used, order[:_SCOUTED], wanted).tolist())
        result[domain] = design.allowed[sorted(chosen)]
    return result


def _weightiest(design: Design, head: Head, used: Bools, among: NDArray[np.int64], wanted: Choice) -> NDArray[np.int64]:
    rows = np.flatnonzero(design.taught_by(head, used))
    x = design.latents[np.ix_(rows, among)]
    weights = design.weights(head, used)[rows]
    w, _ = _logistic(x, design.targets[head][rows], weights, wanted.c, _SCOUT_ITERATIONS)
    return among[np.argsort(-np.abs(w * x.std(axis=0)))[: wanted.by_weight]]


def fit_head(design: Design, head: Head, used: Bools, chosen: NDArray[np.int64], column: str) -> Linear:
    """Fits one head on the rows `used`, over the `latents` chosen or over the dense features (`probe`).

    The logits have unit spread over those rows, so that the two can be mixed; calibration gives them their scale.
    """
    y = design.targets[head]
    rows = np.flatnonzero(design.taught_by(head, used))
    weights = design.weights(head, used)[rows]
    config = design.config
    latents = column == "latents"
    x = design.latents[np.ix_(rows, design.places(chosen))] if latents else design.dense[rows]
    c = config.of_domain(head[0]).c if latents else config.dense_c
    w, bias = _logistic(x, y[rows], weights, c, config.iterations)
    none, no_dense = np.zeros(0, dtype=np.int64), np.zeros(design.dense.shape[1])
    return Linear(chosen, w, no_dense, bias) if latents else Linear(none, np.zeros(0), w, bias)


def _logistic(
    x: Floats, y: NDArray[np.int8], weights: NDArray[np.float64], c: float, iterations: int
) -> tuple[NDArray[np.float64], float]:
    """Weights and bias of L2 logistic regression, for features as they are; their logits have unit spread.

    A feature is scaled by the root of its spread: half of the way to unit spread, since a latent that hardly ever fires
    would be blown up by all of it.
    """
    centre, spread = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
    spread = np.sqrt(spread * np.median(spread))
    z = (x - centre) / spread
    model = LogisticRegression(C=c, max_iter=iterations, tol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopping early is part of the regularisation
        model.fit(z, y, sample_weight=weights)
    scale = max(float(np.std(model.decision_function(z))), 1e-9)
    w = model.coef_[0].astype(np.float64) / spread / scale
    return w, float(model.intercept_[0]) / scale - float(w @ centre)


def mix(latents: Linear, probe: Linear, share: float) -> Linear:
    """The combined head: `share` of the probe's logit and the rest of the latents'."""
    return Linear(
        latents=latents.latents,
        latent_weights=latents.latent_weights * (1 - share),
        dense_weights=probe.dense_weights * share,
        bias=latents.bias * (1 - share) + probe.bias * share,
    )


def calibrate(logits: NDArray[np.float64], y: NDArray[np.int8], weights: NDArray[np.float64]) -> tuple[float, float]:
    """Temperature and shift that make `sigmoid((logit + shift) / temperature)` a probability (weighted likelihood)."""

    def loss(parameters: NDArray[np.float64]) -> float:
        z = (logits + parameters[1]) / np.exp(parameters[0])
        return float((weights * (np.logaddexp(0, z) - y * z)).sum() / weights.sum())

    found = minimize(loss, np.zeros(2), method="Nelder-Mead")
    return float(np.exp(found.x[0])), float(found.x[1])
