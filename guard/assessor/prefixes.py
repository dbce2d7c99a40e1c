"""Chats that begin alike: what was made of their common tokens is kept, and used again instead of reading them anew.

Attention is causal, so what stands behind a prefix changes nothing in it: the keys, values and hits of a chat's first
tokens are those of every chat that begins with the same ones.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.config import PrefixesConfig
from guard.kernels.contract import Encoded
from guard.reader.contract import Growing

SHORTEST = 32  # tokens: to read fewer costs about as much as to copy them


@dataclass(slots=True, eq=False)
class Prefix:
    """A chat that was read. Nothing in it changes any more; `encoded` leaves out the `skip` first tokens."""

    ids: NDArray[np.int64]  # [T]
    skip: int
    stream: Growing
    encoded: tuple[Encoded, ...]  # one a hook point, in numpy's memory
    nbytes: int
    used: float = field(default_factory=time.monotonic)

    def first(self, length: int) -> tuple[Encoded, ...]:
        """What the first `length` tokens, `skip` of them left out, came to."""
        count = length - self.skip
        cut = []
        for e in self.encoded:
            end = int(np.searchsorted(e.token, count))
            cut.append(Encoded(e.token[:end], e.row[:end], e.value[:end], e.probe[:count], finite=True))
        return tuple(cut)


class Prefixes:
    """Bounded in number, bytes and age; the one used longest ago goes first. For use from any thread."""

    def __init__(self, config: PrefixesConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._known: list[Prefix] = []  # the latest used at the end
        self._lock = threading.Lock()

    @property
    def enabled(self) -> bool:
        return self._config.limit > 0

    @property
    def nbytes(self) -> int:
        return sum(prefix.nbytes for prefix in self._known)

    def find(self, ids: Sequence[int], skip: int) -> tuple[Prefix, int] | None:
        """The one that shares the most tokens with `ids`, and how many: less than all of `ids`."""
        wanted = np.asarray(ids, dtype=np.int64)
        with self._lock:
            self._drop()
            shared = [(_shared(prefix.ids, wanted), prefix) for prefix in self._known if prefix.skip == skip]
            count, found = max(shared, key=lambda pair: pair[0], default=(0, None))
            count = min(count, len(wanted) - 1)
            if found is None or count < max(SHORTEST, skip + 1):
                return None
            found.used = self._clock()
            self._known.remove(found)
            self._known.append(found)
            return found, count

    def keep(self, ids: Sequence[int], skip: int, stream: Growing, encoded: Sequence[Sequence[Encoded]]) -> None:
        """`encoded`: of each run of tokens in turn, one a hook point. What holds NaN is not kept."""
        if not all(e.finite for run in encoded for e in run):
            return
        joined = tuple(_joined(runs) for runs in zip(*encoded, strict=True))
        arrays = sum(part.nbytes for e in joined for part in (e.token, e.row, e.value, e.probe))
        wanted = np.asarray(ids, dtype=np.int64)
        new = Prefix(wanted, skip, stream, joined, stream.nbytes + arrays, self._clock())
        with self._lock:
            # A chat that went on takes the place of what it began as.
            self._known = [p for p in self._known if p.skip != skip or _shared(p.ids, wanted) < len(p.ids)]
            self._known.append(new)
            self._drop()

    def sweep(self) -> None:
        """Lets go of what no chat used for too long; to be called now and then, chats or none."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        oldest = self._clock() - self._config.idle_seconds
        self._known = [prefix for prefix in self._known if prefix.used >= oldest]
        while len(self._known) > self._config.limit or self.nbytes > self._config.bytes:
            del self._known[0]


def _shared(known: NDArray[np.int64], wanted: NDArray[np.int64]) -> int:
    length = min(len(known), len(wanted))
    differs = known[:length] != wanted[:length]
    return int(differs.argmax()) if differs.any() else length


def _joined(runs: Sequence[Encoded]) -> Encoded:
    tokens, begin = [], 0
    for run in runs:
        tokens.append(np.asarray(run.token) + begin)
        begin += len(run.probe)

    def together(parts: Sequence[Any]) -> Any:
        return np.concatenate([np.asarray(part) for part in parts])

    return Encoded(
        together(tokens),
        together([run.row for run in runs]),
        together([run.value for run in runs]),
        together([run.probe for run in runs]),
        finite=True,
    )
