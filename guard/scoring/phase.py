"""A phase's running state: what it adds up to as a whole, and what its passages do.

Pooling thins a harmful passage out by all that stands around it. So a phase that is longer than a passage is scored as
a whole and passage by passage, and each head says of it the most that it says of any of these. Of many passages one
will look severe by chance: of n passages each is held back by `caution * ln(n)`.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from guard.scoring.pooling import Floats, Hits, Ints, Pool


class PhaseState:
    """The whole, the half of a passage under way and the one before, and by head the severest passage that has ended.

    Passages are `passage_tokens` tokens long and overlap by half; the last is as long as it is. Where they are cut
    depends on nothing but the number of tokens, so that a stream comes to what its whole text comes to. Each token is
    added to one half; what the whole and the passages come to is the sum of their halves.
    """

    def __init__(
        self,
        new_pool: Callable[[int], Pool],
        passage_tokens: int,
        caution: Floats,
        logits: Callable[[Sequence[Pool]], Floats],
    ) -> None:
        """`new_pool`: an empty one that begins at a token of the phase; `logits [V, H]` of V pools; `caution [H]`.

        With `passage_tokens` 0 there are no passages.
        """
        self.finite = True
        self._new_pool, self._caution, self._logits = new_pool, caution, logits
        self._half = passage_tokens // 2
        self._current = new_pool(0)  # the half under way
        self._before: Pool | None = None  # the half before that one
        self._past: Pool | None = None  # all before the half under way
        self._whole: Pool | None = None  # once it has been asked for
        self._ended: list[Pool] = []  # [H] the severest passage, once one has ended
        self._most: Floats | None = None  # [H] their logits

    @property
    def whole(self) -> Pool:
        if self._whole is None:
            self._whole = self._past.joined(self._current) if self._past else self._current
        return self._whole

    @property
    def tokens(self) -> int:
        return self._current.begin + self._current.tokens

    def add(self, hits: Hits, where: Ints) -> None:
        """`where [T, 3]`: start, end and message of each token of the run.

        A value that is not finite ends the scoring.
        """
        if not self.finite or not hits.tokens:
            return
        self._whole = None
        ends = [hits.tokens]
        if self._half:
            ends = [*range(self._half - self._current.tokens, hits.tokens, self._half), hits.tokens]
        ended: list[Pool] = []
        parts = hits.slices(ends) if len(ends) > 1 else [hits]
        for (low, high), part in zip(pairwise([0, *ends]), parts, strict=True):
            self._current.add(part, where[low:high])
            if not self._current.finite:
                self.finite = False
                return
            if self._current.tokens == self._half:
                ended += self._turn()
        if ended:
            self._judge(ended)

    def _turn(self) -> list[Pool]:
        """Begins the next half; returns the passage that ends, where one does."""
        half = self._current
        half.gather()
        ended = [self._before.joined(half)] if self._before else []
        self._past = self._past.joined(half) if self._past else half
        self._past.trim()
        self._before, self._current = half, self._new_pool(self.tokens)
        return ended

    def _judge(self, passages: Sequence[Pool]) -> None:
        for passage, logits in zip(passages, self._logits(passages), strict=True):
            if self._most is None:
                self._most, self._ended = logits, [passage] * len(logits)
            for head in np.flatnonzero(logits > self._most):
                self._ended[head] = passage
            self._most = np.maximum(self._most, logits)

    def unsettled(self) -> list[Pool]:
        """What more tokens change: the whole, and its last passage where that has not ended."""
        if self._most is None or self._before is None or not self._current.tokens:
            return [self.whole]
        return [self.whole, self._before.joined(self._current)]

    def held_back(self) -> Floats:
        """`[H]`: by how much a passage's logits are."""
        passages = -(-self.tokens // self._half) - 1 if self._half else 1
        return self._caution * math.log(max(passages, 1))

    def most(self, logits: Floats) -> Floats:
        """`[V, H]` logits of what is unsettled -> `[H]` those of the phase."""
        whole: Floats = logits[0]
        if self._most is None:
            return whole
        passages = np.maximum(logits[1], self._most) if len(logits) > 1 else self._most
        result: Floats = np.maximum(whole, passages - self.held_back())
        return result

    def severest(self) -> list[Pool]:
        """`[H]`: what each head finds severest, the whole or a passage of it."""
        found = [self.whole] * len(self._caution)
        if self._most is None or self.tokens <= 2 * self._half:
            return found
        unsettled = self.unsettled()
        whole, *last = self._logits(unsettled)
        ended = self._most - self.held_back()
        under_way = last[0] - self.held_back() if last else np.full_like(whole, -np.inf)
        for head in np.flatnonzero(np.maximum(ended, under_way) > whole):
            found[head] = self._ended[head] if ended[head] >= under_way[head] else unsettled[1]
        return found
