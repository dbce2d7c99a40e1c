"""What every reader takes and gives: the torch reader, and the exported one that runs without torch."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Activations = Mapping[str, Any]  # hook point -> [T, d_model], of the reader's library and dtype


class Growing(Protocol):
    """The keys and values of a sequence that grows: one stream's cache."""

    length: int  # tokens read so far

    @property
    def nbytes(self) -> int: ...

    def take(self, other: Any, length: int) -> None:
        """Begins a stream that has read nothing with the first `length` tokens of another one of its kind."""
        ...


class Reader(Protocol):
    """Reads token ids and returns what its hook points put out. Not thread-safe: one worker owns it."""

    hook_points: tuple[str, ...]
    d_model: int
    positions: int | None  # tokens read at once, at most

    def read(self, sequences: Sequence[Sequence[int]]) -> Sequence[Activations]:
        """Whole sequences in one batch: `[len(sequence), d_model]` a hook point for each."""
        ...

    def new_stream(self) -> Growing: ...

    def extend(self, steps: Sequence[tuple[Any, Sequence[int]]]) -> Sequence[Activations]:
        """Reads the next tokens of each stream; earlier tokens are not read again.

        A step that raises leaves the length of its stream as it was: it can be read again.
        """
        ...

    def flops_per_token(self) -> int:
        """Multiply-adds of the weight matrices, times two; attention scores not counted."""
        ...
