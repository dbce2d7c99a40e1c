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
    """The whole, two passages under way, and of those that have ended the severest for each head.

    Passages are `passage_tokens` tokens long and overlap by half; the last is as long as it is. Where they are cut
    depends on nothing but the number of tokens, so that a stream comes to what its whole text comes to.
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
        self.whole = new_pool(0)
        self._new_pool, self._caution, self._logits = new_pool, caution, logits
        self._half = passage_tokens // 2
        self._under_way: list[Pool] = []  # the older first; each began half a passage after the one before
        self._ended: list[Pool] = []  # [H] the severest, once one has ended
        self._most: Floats | None = None  # [H] their logits

    @property
    def finite(self) -> bool:
        return self.whole.finite

    @finite.setter
    def finite(self, value: bool) -> None:
        self.whole.finite = value

    @property
    def tokens(self) -> int:
        return self.whole.tokens

    def add(self, hits: Hits, where: Ints) -> None:
        """`where [T, 3]`: start, end and message of each token of the run.

        A value that is not finite ends the scoring.
        """
        begin = self.whole.tokens
        self.whole.add(hits, where)
        if not self._half or not self.finite or not hits.tokens:
            return
        ends = [*range(self._half - begin % self._half, hits.tokens, self._half), hits.tokens]
        parts = hits.slices(ends) if len(ends) > 1 else [hits]
        for (low, high), part in zip(pairwise([0, *ends]), parts, strict=True):
            self._add(begin + low, part, where[low:high])

    def _add(self, begin: int, hits: Hits, where: Ints) -> None:
        """A run that ends at half a passage at the latest."""
        if begin % self._half == 0:
            self._under_way.append(self._new_pool(begin))
        for pool in self._under_way:
            pool.add(hits, where)
        if self._under_way[0].tokens == 2 * self._half:
            self._end(self._under_way.pop(0))

    def _end(self, passage: Pool) -> None:
        passage.settle()
        logits = self._logits([passage])[0]
        if self._most is None:
            self._most, self._ended = logits, [passage] * len(logits)
        for head in np.flatnonzero(logits > self._most):
            self._ended[head] = passage
        self._most = np.maximum(self._most, logits)

    def unsettled(self) -> list[Pool]:
        """What more tokens change: the whole, and its last passage where that has not ended."""
        last = self._under_way[:1] if self._most is not None and len(self._under_way) == 2 else []
        return [self.whole, *last]

    def held_back(self) -> Floats:
        """`[H]`: by how much a passage's logits are."""
        passages = -(-self.tokens // self._half) - 1 if self._half else 1
        return self._caution * math.log(max(passages, 1))

    def most(self, logits: Floats) -> Floats:
        """`[V, H]` logits of what is unsettled -> `[H]` those of the phase."""
        whole: Floats = logits[0]
        if self._most is None:
            return whole
        passages: Floats = np.vstack([logits[1:], self._most]).max(axis=0)
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
