"""What the hits and probes of a run of tokens add up to: of a phase so far, or of one of its passages. Small, bounded.

`pooled_i = (sum over tokens of g_i(value_ti) / length ** exponent) ** power`; dense probes are averaged over `length`:
the tokens, and some prior ones that tell nothing. Few tokens are little evidence: on the first words of a text every
score lies near its head's bias.

A token's part of a pooled activation is its share of the sum, so that the logit splits exactly into contributions of
latents and of tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guard.pack.manifest import PoolingSection

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SPANS_KEPT = 8  # tokens remembered for each latent, the strongest ones
_UNSORTED = 2048  # hits that may wait to be sorted in among the strongest ones: sorting at every token costs most of it


@dataclass(frozen=True, slots=True)
class Hits:
    """Hits of a run of tokens over all hook points, rows numbered through the pack; a row fires once on a token."""

    token: Ints  # [N] index into the run
    row: Ints  # [N]
    value: Floats  # [N]
    probe: Floats  # [T, P]

    @property
    def tokens(self) -> int:
        return len(self.probe)

    def of(self, chosen: NDArray[np.bool_]) -> "Hits":
        """Those of some tokens of the run `[T]`, renumbered."""
        kept = chosen[self.token]
        number = np.cumsum(chosen) - 1
        return Hits(number[self.token[kept]], self.row[kept], self.value[kept], self.probe[chosen])

    def slices(self, ends: Sequence[int]) -> "list[Hits]":
        """The run cut into runs that end before these tokens, the last of them its own end."""
        order = np.argsort(self.token, kind="stable")
        token, row, value = self.token[order], self.row[order], self.value[order]
        result, begin, at = [], 0, 0
        for end, to in zip(ends, np.searchsorted(token, ends).tolist(), strict=True):
            result.append(Hits(token[at:to] - begin, row[at:to], value[at:to], self.probe[begin:end]))
            begin, at = end, to
        return result


class Gate:
    """g, a hit's strength: 0 at its latent's threshold, 1 from its scale on, straight between.

    A gate that jumped at the threshold would let the last bit of an activation decide; the same text read in other
    chunks would then score differently.
    """

    def __init__(self, threshold: Floats, scale: Floats) -> None:
        self.scale = scale  # [K]
        self._threshold = threshold  # [K]
        self._rise: Floats = scale - threshold  # [K]

    def __call__(self, row: Ints, value: Floats) -> Floats:
        """`[N]` rows and values of hits -> strengths `[N]`."""
        result: Floats = (value - self._threshold[row]) / self._rise[row]
        return np.minimum(np.maximum(result, 0.0, out=result), 1.0, out=result)  # np.clip takes twice as long


@dataclass(frozen=True, slots=True)
class Spans:
    """Hits by row, as lists: many small slices of them are taken."""

    row: Ints  # [N]
    strength: list[float]
    start: list[int]
    end: list[int]
    message: list[int]


class Pool:
    """Sums over a run of tokens, and the strongest hits of each latent."""

    def __init__(self, gate: Gate, probes: int, pooling: PoolingSection, begin: int = 0) -> None:
        self._gate = gate
        self._pooling = pooling
        self.begin = begin  # in tokens of the phase
        self.tokens = 0
        self.first: Ints = np.zeros(3, dtype=np.int64)  # where the run's first token stands: start, end, message
        self.last: Ints = self.first
        self.finite = True
        self.sums = np.zeros(len(gate.scale))  # [K]
        self.peak = np.zeros(len(gate.scale))  # [K] in units of scale
        self.probe_sums = np.zeros(probes)  # [P]
        # the strongest hits: row, strength, and where the token stands
        self._kept_row: Ints = np.zeros(0, dtype=np.int64)
        self._kept_strength: Floats = np.zeros(0)
        self._kept_where: NDArray[np.int32] = np.zeros((0, 3), dtype=np.int32)  # start, end, message
        self._unsorted: list[tuple[Ints, Floats, NDArray[np.int32]]] = []
        self._unsorted_hits = 0

    def add(self, hits: Hits, where: Ints) -> None:
        """`where [T, 3]`: start, end and message of each token of the run.

        A value that is not finite ends the scoring.
        """
        probes = hits.probe.sum(axis=0)
        # Huge activations overflow. Sums tell of any: those of float32 values stay far below what overflows here.
        if not math.isfinite(hits.value.sum() + probes.sum()):
            self.finite = False
            return
        if hits.tokens:
            self.first = self.first if self.tokens else where[0].copy()
            self.last = where[-1].copy()
        self.tokens += hits.tokens
        self.probe_sums += probes
        if not len(hits.row):
            return
        row, strengths = hits.row, self._gate(hits.row, hits.value)
        relative = hits.value / self._gate.scale[row]
        if hits.tokens == 1:  # no row twice
            self.sums[row] += strengths
            self.peak[row] = np.maximum(self.peak[row], relative)
        else:
            np.add.at(self.sums, row, strengths)
            np.maximum.at(self.peak, row, relative)
        self._unsorted.append((row, strengths, where[hits.token].astype(np.int32)))
        self._unsorted_hits += len(row)
        if self._unsorted_hits > _UNSORTED:
            self.settle()

    def settle(self) -> None:
        """Sorts in the hits that wait for it, which hold on to the runs that they came in."""
        if not self._unsorted:
            return
        parts = zip((self._kept_row, self._kept_strength, self._kept_where), *self._unsorted, strict=True)
        row, strengths, places = (np.concatenate(part) for part in parts)
        self._unsorted, self._unsorted_hits = [], 0
        order = np.argsort(-strengths, kind="stable")  # by row, the strongest first; earlier tokens win ties
        narrow = row[order].astype(np.min_scalar_type(len(self.sums)))  # numpy sorts 16 bits in linear time
        order = order[np.argsort(narrow, kind="stable")]
        by_row = row[order]
        late = by_row[SPANS_KEPT:] == by_row[:-SPANS_KEPT]  # as many of the same row stand before it
        kept = order[np.concatenate([np.ones(len(order) - len(late), dtype=bool), ~late])]
        self._kept_row, self._kept_strength, self._kept_where = row[kept], strengths[kept], places[kept]

    @property
    def kept_row(self) -> Ints:
        """Rows of the strongest hits, in their order."""
        self.settle()
        return self._kept_row

    @property
    def length(self) -> float:
        return max(self.tokens + self._pooling.prior_tokens, 1.0)

    @property
    def divisor(self) -> float:
        return float(self.length**self._pooling.exponent)

    def pooled(self) -> Floats:
        """`[K]`."""
        result: Floats = (self.sums / self.divisor) ** self._pooling.power
        return result

    def pooled_per_unit(self) -> Floats:
        """`[K]` pooled activation over the sum that made it: a token's part of it is its strength times this."""
        result: Floats = np.divide(self.pooled(), self.sums, out=np.zeros_like(self.sums), where=self.sums > 0)
        return result

    def pooled_probes(self) -> Floats:
        """`[P]`."""
        return self.probe_sums / self.length

    def spans(self, rows: Ints) -> Spans:
        """The strongest hits of these latents, those of one in the order of the text."""
        self.settle()
        mine = np.isin(self._kept_row, rows)
        row, strength, where = self._kept_row[mine], self._kept_strength[mine], self._kept_where[mine]
        start, end, message = where.T
        order = np.lexsort((start, message, row))
        return Spans(
            row[order], strength[order].tolist(), start[order].tolist(), end[order].tolist(), message[order].tolist()
        )
