"""Scores of explanations, one line a latent, and how two sets of them agree."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.stats import rankdata

from guard.errors import InvalidInput
from guard.lab.explain.records import OfLatent, read

SCORES, SUMMARY = "scores.jsonl", "summary.json"
_BOOTSTRAPS = 2000

Interval = tuple[float, float]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LatentScores(OfLatent):
    """A line of `scores.jsonl`."""

    scores: dict[str, float]  # such as {"simulation_segment": 0.41}, as a pack names them
    items: int  # tokens, segments or windows that they were judged on,
    firing: int  # and in how many of them the latent fires
    tokens_sent: float = 0.0  # its share of what the prompt cost
    tokens_received: float = 0.0
    annotator: str = ""  # empty: none was needed
    prompt: str = ""

    @property
    def tokens(self) -> float:
        return self.tokens_sent + self.tokens_received


class Cost(_Strict):
    """Tokens that the scored latents cost together, as whoever answered counted them."""

    prompts: int
    tokens_sent: int
    tokens_received: int
    tokens_per_latent: float


class Agreement(_Strict):
    """One score against another run's, over the latents that have both."""

    score: str
    against: str
    latents: int
    spearman: float | None  # None: fewer than three latents, or all tied
    interval: Interval | None  # 95%, bootstrap over latents
    tokens_per_latent: float
    tokens_per_latent_against: float
    cost_cut: float | None  # share of the other's tokens that is saved; None where the other cost nothing


def pearson(predicted: Sequence[float], true: Sequence[float]) -> float | None:
    """None where the truth does not vary; 0 where only the prediction does not: it tells nothing."""
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if np.ptp(y) == 0:
        return None
    if np.ptp(x) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def medians(lines: Sequence[LatentScores]) -> dict[str, float]:
    names = dict.fromkeys(name for line in lines for name in line.scores)
    return {n: round(float(np.median([s.scores[n] for s in lines if n in s.scores])), 4) for n in names}


def cost(lines: Sequence[LatentScores], prompts: int) -> Cost:
    sent, received = sum(s.tokens_sent for s in lines), sum(s.tokens_received for s in lines)
    return Cost(
        prompts=prompts,
        tokens_sent=round(sent),
        tokens_received=round(received),
        tokens_per_latent=round((sent + received) / max(len(lines), 1), 1),
    )


def agreements(lines: Sequence[LatentScores], folder: Path) -> tuple[Agreement, ...]:
    """Each score of `lines` with each in `folder`. Raises InvalidInput where that holds no scores."""
    if not (folder / SCORES).exists():
        raise InvalidInput(f"{folder}: holds no {SCORES}; expected what `guard lab simulate` wrote")
    others = {(s.sae, s.latent): s for s in read(folder / SCORES, LatentScores)}
    both = [(s, others[s.sae, s.latent]) for s in lines if (s.sae, s.latent) in others]
    pairs = {(a, b): None for s, o in both for a in s.scores for b in o.scores}
    return tuple(_agreement(a, b, [(s, o) for s, o in both if a in s.scores and b in o.scores]) for a, b in pairs)


def _agreement(score: str, against: str, both: Sequence[tuple[LatentScores, LatentScores]]) -> Agreement:
    x = np.array([s.scores[score] for s, _ in both])
    y = np.array([o.scores[against] for _, o in both])
    mine, other = (float(np.mean([line.tokens for line in side])) for side in zip(*both, strict=True))
    rho, interval = spearman(x, y)
    return Agreement(
        score=score,
        against=against,
        latents=len(both),
        spearman=rho,
        interval=interval,
        tokens_per_latent=round(mine, 1),
        tokens_per_latent_against=round(other, 1),
        cost_cut=round(1 - mine / other, 4) if other else None,
    )


def spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float | None, Interval | None]:
    """Rank correlation, and its 95% interval by bootstrap over the pairs."""
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None, None
    drawn = np.random.default_rng(0).integers(len(x), size=(_BOOTSTRAPS, len(x)))
    return round(float(_rank_correlation(x, y)), 4), interval95(_rank_correlation(x[drawn], y[drawn]))


def _rank_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Along the last axis; NaN where all of it are tied."""
    rx, ry = (rankdata(side, axis=-1) - (x.shape[-1] + 1) / 2 for side in (x, y))
    with np.errstate(invalid="ignore"):
        return np.asarray((rx * ry).sum(axis=-1) / np.sqrt((rx**2).sum(axis=-1) * (ry**2).sum(axis=-1)))


def interval95(values: NDArray[np.float64]) -> Interval:
    """Of bootstrapped values, those that are none left out."""
    low, high = np.quantile(values[np.isfinite(values)], [0.025, 0.975])
    return round(float(low), 4), round(float(high), 4)
