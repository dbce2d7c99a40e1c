"""The tokens of one text as the model reads them, and the overlapping windows that a long one is read in."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from guard.reader.tokens import Piece
from guard.records import Phase

SCAFFOLD = None  # the phase of template tokens, which are read but never scored


@dataclass(slots=True)
class TokenSequence:
    """Token ids with the place and phase of each, growing at the end."""

    ids: list[int] = field(default_factory=list)
    phase: list[Phase | None] = field(default_factory=list)
    _where: "array[int]" = field(default_factory=lambda: array("i"))  # start, end and message of each; tuples are large

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, piece: Piece, phase: Phase | None, shift: int = 0) -> None:
        """`shift`: characters of the same text that stand before this piece."""
        self.ids += piece.ids
        message = max(piece.message, 0)
        for start, end in piece.spans:
            self._where.extend((start + shift, end + shift, message))
        self.phase += [phase if piece.message >= 0 else SCAFFOLD] * len(piece.ids)

    def put(self, number: int, where: tuple[int, int, int], phase: Phase | None) -> None:
        """Adds one token; `where`: its start, its end, and its message."""
        self.ids.append(number)
        self._where.extend(where)
        self.phase.append(phase)

    def places(self, begin: int = 0, end: int | None = None) -> NDArray[np.int64]:
        """`[T, 3]`: start, end and message of tokens `begin` to `end`."""
        return np.array(self._where[3 * begin : None if end is None else 3 * end], dtype=np.int64).reshape(-1, 3)


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `begin` to `end` are read at once, behind a sink token where `sink`; those from `fresh` on are new."""

    begin: int
    fresh: int
    end: int
    sink: bool


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Windows of `size` tokens, the sink token counted, each sharing `overlap` tokens with the one before.

    Where windows lie depends on positions alone, so a stream and a whole text are read in the same windows.
    """

    size: int
    overlap: int

    def first(self, *, sink: bool) -> Window:
        return Window(0, 0, self.size - sink, sink)

    def after(self, window: Window) -> Window:
        begin = window.end - self.overlap
        return Window(begin, window.end, begin + self.size - 1, sink=True)

    def cover(self, length: int, *, sink: bool) -> Iterator[Window]:
        window = self.first(sink=sink)
        while window.end < length:
            yield window
            window = self.after(window)
        yield Window(window.begin, window.fresh, length, window.sink)


def window_ids(sequence: Sequence[int], window: Window, sink_id: int) -> list[int]:
    ids = list(sequence[window.begin : window.end])
    return [sink_id, *ids] if window.sink else ids
