"""Tests of many latents at once, one-sided: whether they fire more where the concept is.

    pairs     exact sign test over discordant pairs (McNemar's): fires on q+ only, against on q- only
    sources   rank test (Mann-Whitney, ties counted) inside each stratum of labelled texts; the strata of a group of
              sources (translations of each other, halves of one data set) are averaged into one, as if they moved
              together; then one statistic over the groups (van Elteren's, but each weighs by the root of what it
              would: no large source rules)
    a latent  several questions of one concept are one test, by Simes's method or by Hommel's
    many      q-values, by Benjamini and Hochberg's or by Benjamini and Yekutieli's

Hommel's and Yekutieli's hold under any dependence.

Latents are silent in most texts, so a rank sum is as skewed as a count of rare events, and the normal tail far too
small; p comes from the gamma distribution that has the statistic's variance and skewness (Pearson III) instead.

What p means: how often so large a statistic is seen of a latent that goes with the concept inside none of these
sources (pairs); that null is controlled. The variance is taken no smaller than the one seen between the groups, so that
many texts of one source do not make its quirk sure. With few groups this is a precaution, no promise about sources that
are not here: what those say is measured by precision on held-out groups (guard.lab.search.precision).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc, gammainc, gammaincc, ndtr

Array = NDArray[np.float64]
Control = Literal["bh", "by"]

LEAST_DISCORDANT = 5  # with fewer, p cannot fall below 0.05: not tested
LEAST_TEXTS = 20  # a latent that fires in fewer labelled texts is not tested
LEVEL = 0.05
_NORMAL_BELOW = 1e-3  # a skewness under which the gamma is the normal


def sign_test(forward: NDArray[np.int64], backward: NDArray[np.int64]) -> tuple[Array, Array]:
    """p `[K]` that so many of the discordant pairs go forward by chance, and the chance of p <= LEVEL under the null.

    p is NaN, and the chance 0, where LEAST_DISCORDANT is not reached.
    """
    count = forward + backward
    p = np.where(forward > 0, bdtrc(np.maximum(forward - 1, 0), np.maximum(count, 1), 0.5), 1.0)
    chance = _attainable(int(count.max(initial=0)))[count]
    tested = count >= LEAST_DISCORDANT
    return np.where(tested, p, np.nan), np.where(tested, chance, 0.0)


def _attainable(most: int) -> Array:
    """For each number of discordant pairs up to `most`, the largest p of the sign test that is at most LEVEL."""
    result = np.zeros(most + 1)
    for count in range(1, most + 1):
        tail = bdtrc(np.arange(count), count, 0.5)  # of 1, 2, ... going forward
        result[count] = tail[tail <= LEVEL].max(initial=0.0)
    return result


@dataclass(frozen=True)
class Stratum:
    """A rank test inside one set of texts, for all latents: AUROC - 0.5, and its null variance and third moment."""

    weight: float  # van Elteren's: positives * negatives / (texts + 1)
    shift: Array  # [K]
    variance: Array  # [K]
    third: Array  # [K]
    fires: NDArray[np.int64]  # [K] texts


def rank_stratum(strength: NDArray[np.float16], positive: NDArray[np.bool_]) -> Stratum:
    """`strength [n, K]` >= 0, mostly 0; `positive [n]`, the other texts being negatives. Both must be there."""
    n, width = strength.shape
    n1 = int(positive.sum())
    n2 = n - n1
    bits = np.ascontiguousarray(strength).view(np.uint16)  # halves that are not negative sort as their bits do
    row, column = bits.nonzero()
    key = column.astype(np.int64) << 16 | bits[row, column]
    order = np.argsort(key)
    key, hit = key[order], positive[row[order]]
    first = np.flatnonzero(np.diff(key, prepend=-1))  # of each group of equal values of one latent
    size = np.diff(first, append=len(key))
    hits = np.add.reduceat(hit.astype(np.int64), first) if len(first) else np.zeros(0, dtype=np.int64)
    owner = (key[first] >> 16).astype(np.int64)
    fires = np.bincount(owner, weights=size, minlength=width)
    silent = n - fires
    below = np.cumsum(size) - size
    starts = np.concatenate([[0.0], np.cumsum(fires)])[:-1]  # of each latent among the values
    rank = silent[owner] + below - starts[owner] + (size + 1) / 2 - (n + 1) / 2  # mean rank of the group, centred
    rank_silent = (silent + 1) / 2 - (n + 1) / 2

    def moment(weights: NDArray[Any], silent_weights: NDArray[Any], power: int) -> Array:
        voiced = np.bincount(owner, weights=weights * rank**power, minlength=width)
        return np.asarray(voiced + silent_weights * rank_silent**power, dtype=np.float64)

    hits_silent = n1 - np.bincount(owner, weights=hits, minlength=width)
    product = n1 * n2
    skew = product * (n2 - n1) / (n * (n - 1) * max(n - 2, 1))
    return Stratum(
        weight=product / (n + 1),
        shift=moment(hits, hits_silent, 1) / product,
        variance=moment(size, silent, 2) / (n * (n - 1)) / product,
        third=skew * moment(size, silent, 3) / product**3,
        fires=fires.astype(np.int64),
    )


def together(strata: Sequence[Stratum]) -> Stratum:
    """One stratum for those of a group: their mean, with the moments that it has if they move as one, the largest."""
    share = np.sqrt([s.weight for s in strata])
    share /= share.sum()
    return Stratum(
        weight=float(np.mean([s.weight for s in strata])),
        shift=share @ np.stack([s.shift for s in strata]),
        variance=(share @ np.sqrt([s.variance for s in strata])) ** 2,
        third=(share @ np.cbrt([s.third for s in strata])) ** 3,
        fires=np.sum([s.fires for s in strata], axis=0),
    )


def pooled(strata: Sequence[Stratum]) -> tuple[Array, Array]:
    """Effect (mean AUROC - 0.5) and p, `[K]`, over independent strata; NaN p where LEAST_TEXTS is not reached."""
    weight = np.sqrt([s.weight for s in strata])[:, None]
    weight /= weight.sum()
    shift = np.stack([s.shift for s in strata])  # [S, K]
    effect = (weight * shift).sum(axis=0)
    within = (weight**2 * np.stack([s.variance for s in strata])).sum(axis=0)
    third = (weight**3 * np.stack([s.third for s in strata])).sum(axis=0)
    spread = (weight**2 * (shift - effect) ** 2).sum(axis=0) * (len(strata) / max(len(strata) - 1, 1))
    variance = np.maximum(np.maximum(within, spread), 1e-30)
    p = upper_tail(effect / np.sqrt(variance), third / variance**1.5)
    fires = np.sum([s.fires for s in strata], axis=0)
    return effect, np.where(fires >= LEAST_TEXTS, p, np.nan)


def upper_tail(z: Array, skewness: Array) -> Array:
    """Chance of exceeding `z` under the gamma distribution of mean 0, variance 1 and this skewness."""
    bent = np.where(np.abs(skewness) < _NORMAL_BELOW, 1.0, skewness)
    shape = 4 / bent**2
    right = gammaincc(shape, np.maximum(shape + z * np.sqrt(shape), 0.0))
    left = gammainc(shape, np.maximum(shape - z * np.sqrt(shape), 0.0))
    return np.asarray(np.where(np.abs(skewness) < _NORMAL_BELOW, ndtr(-z), np.where(skewness > 0, right, left)))


def simes(p: Array, control: Control = "bh") -> Array:
    """One p `[K]` for each column of `p [Q, K]`: that none of its questions is true. NaN, not tested, is left out.

    With `by` it holds under any dependence of the questions too (Hommel).
    """
    numbers = np.arange(1, len(p) + 1)[:, None]
    count = (~np.isnan(p)).sum(axis=0)
    penalty = (1 / numbers * (numbers <= count)).sum(axis=0) if control == "by" else 1.0
    smallest = np.fmin.reduce(np.sort(p, axis=0) * count / numbers, axis=0)  # NaN sorts last, and is passed over
    return np.asarray(np.minimum(smallest * penalty, 1.0))


def q_values(p: Array, control: Control = "bh") -> Array:
    """The false-discovery rate at which each would just be found, in the shape of `p`; NaN, not tested, stays NaN."""
    flat = p.ravel()
    places = np.flatnonzero(~np.isnan(flat))
    result = np.full(flat.shape, np.nan)
    if count := len(places):
        order = places[np.argsort(flat[places])]
        numbers = np.arange(1, count + 1)
        penalty = float((1 / numbers).sum()) if control == "by" else 1.0
        rising = np.minimum.accumulate((flat[order] * count * penalty / numbers)[::-1])[::-1]
        result[order] = np.minimum(rising, 1.0)
    return result.reshape(p.shape)
