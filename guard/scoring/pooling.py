"""What the hits and probes of a run of tokens add up to: of a phase so far, or of one of its passages. Small, bounded.

`pooled_i = (sum over tokens of g_i(value_ti) / length ** exponent) ** power`; dense probes are averaged over `length`:
the tokens, and some prior ones that tell nothing. Few tokens are little evidence: on the first words of a text every
score lies near its head's bias.

A token's part of a pooled activation is its share of the sum, so that the logit splits exactly into contributions of
latents and of tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.pack.manifest import PoolingSection

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SPANS_KEPT = 8  # tokens told of each latent, the strongest ones
_ROOM = 4096  # hits kept beside them before the weak ones go: to look for the strongest at every token costs too much
_PARTS = 64  # in which they may lie


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


class _Kept(NamedTuple):
    """Hits that are remembered, and where their tokens stand."""

    row: Ints  # [N]
    strength: Floats  # [N]
    where: NDArray[np.int32]  # [N, 3] start, end, message

    @staticmethod
    def joined(parts: "Sequence[_Kept]") -> "_Kept":
        none = _Kept(np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros((0, 3), dtype=np.int32))
        return _Kept(*map(np.concatenate, zip(*(parts or [none]), strict=True)))

    def of(self, chosen: NDArray[np.bool_] | Ints) -> "_Kept":
        return _Kept(self.row[chosen], self.strength[chosen], self.where[chosen])


@dataclass(slots=True, eq=False)
class Pool:
    """Sums over a run of tokens, and the strongest hits of each latent."""

    gate: Gate
    pooling: PoolingSection
    begin: int  # in tokens of the phase
    sums: Floats  # [K]
    peak: Floats  # [K] in units of scale
    probe_sums: Floats  # [P]
    tokens: int = 0
    first: Ints = field(default_factory=lambda: np.zeros(3, dtype=np.int64))  # where the first token stands
    last: Ints = field(default_factory=lambda: np.zeros(3, dtype=np.int64))
    finite: bool = True
    hits_kept: int = 0
    kept: list[_Kept] = field(default_factory=list)  # in parts; the strongest hits and more
    _room: int = _ROOM

    @staticmethod
    def empty(gate: Gate, probes: int, pooling: PoolingSection, begin: int = 0) -> "Pool":
        latents = len(gate.scale)
        return Pool(gate, pooling, begin, np.zeros(latents), np.zeros(latents), np.zeros(probes))

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
        row, strengths = hits.row, self.gate(hits.row, hits.value)
        relative = hits.value / self.gate.scale[row]
        if hits.tokens == 1:  # no row twice
            self.sums[row] += strengths
            self.peak[row] = np.maximum(self.peak[row], relative)
        else:
            np.add.at(self.sums, row, strengths)
            np.maximum.at(self.peak, row, relative)
        # A copy: the rows may be a slice of a long run's.
        self.kept.append(_Kept(row.copy(), strengths, where[hits.token].astype(np.int32)))
        self.hits_kept += len(row)
        self.trim()

    def joined(self, after: "Pool") -> "Pool":
        """The run of this one and of one that begins where it ends; neither changes."""
        if not after.tokens:
            return self
        return Pool(
            self.gate,
            self.pooling,
            self.begin,
            self.sums + after.sums,
            np.maximum(self.peak, after.peak),
            self.probe_sums + after.probe_sums,
            self.tokens + after.tokens,
            self.first,
            after.last,
            self.finite and after.finite,
            kept=self.kept + after.kept,
            hits_kept=self.hits_kept + after.hits_kept,
            _room=self._room,
        )

    def trim(self) -> None:
        """Keeps the strongest hits of each latent where there are many, and few parts."""
        if self.hits_kept > self._room:
            self.kept = [self._strongest(_Kept.joined(self.kept))]
            self.hits_kept = len(self.kept[0].row)
            self._room = self.hits_kept + _ROOM
        elif len(self.kept) > _PARTS:
            self.gather()

    def gather(self) -> None:
        """Puts what is kept into one part."""
        self.kept = [_Kept.joined(self.kept)] if self.hits_kept else []

    def _strongest(self, kept: _Kept) -> _Kept:
        """Those of each latent, by latent; of two alike the earlier one."""
        # One number says it all, so that one plain sort does: latent, weakness, place.
        places = len(kept.row).bit_length()
        bits = min(62 - len(self.sums).bit_length() - places, 52)
        weakness = ((1.0 - kept.strength) * (1 << bits)).astype(np.int64)
        order = np.argsort((((kept.row << (bits + 1)) + weakness) << places) + np.arange(len(kept.row)))
        by_row = kept.row[order]
        late = by_row[SPANS_KEPT:] == by_row[:-SPANS_KEPT]  # as many of the same row stand before it
        return kept.of(order[np.concatenate([np.ones(len(order) - len(late), dtype=bool), ~late])])

    @property
    def length(self) -> float:
        return max(self.tokens + self.pooling.prior_tokens, 1.0)

    @property
    def divisor(self) -> float:
        return float(self.length**self.pooling.exponent)

    def pooled(self) -> Floats:
        """`[K]`."""
        result: Floats = (self.sums / self.divisor) ** self.pooling.power
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
        wanted = np.zeros(len(self.sums), dtype=bool)
        wanted[rows] = True
        kept = _Kept.joined(self.kept)
        row, strength, where = self._strongest(kept.of(wanted[kept.row]))
        start, end, message = where.T
        order = np.lexsort((start, message, row))
        return Spans(
            row[order], strength[order].tolist(), start[order].tolist(), end[order].tolist(), message[order].tolist()
        )
