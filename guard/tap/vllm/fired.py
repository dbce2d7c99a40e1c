"""What fired on a run of tokens, as the ledger and the store cut it and join it. Numpy only."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Fired:
    """`T` tokens, `N` hits in order of their tokens, `P` probe rows of the whole pack."""

    ids: NDArray[np.int32]  # [T] token ids
    token: NDArray[np.int32]  # [N] index into the run, ascending
    row: NDArray[np.int32]  # [N] numbered through the pack
    value: NDArray[np.float32]  # [N]
    probe: NDArray[np.float32]  # [T, P]
    finite: bool = True

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.ids, self.token, self.row, self.value, self.probe))

    def cut(self, begin: int, end: int) -> "Fired":
        """Tokens `begin` to `end` (exclusive), as views."""
        if begin == 0 and end == len(self.ids):
            return self
        first, last = self.token.searchsorted((begin, end)).tolist()
        token = self.token[first:last] - begin if begin else self.token[first:last]
        return Fired(
            self.ids[begin:end], token, self.row[first:last], self.value[first:last], self.probe[begin:end], self.finite
        )

    def compact(self) -> "Fired":
        """A copy that holds no view of a larger array alive."""
        return Fired(
            self.ids.copy(), self.token.copy(), self.row.copy(), self.value.copy(), self.probe.copy(), self.finite
        )


def joined(runs: Sequence[Fired]) -> Fired:
    """Runs of consecutive tokens as one; a copy where there are several."""
    if len(runs) == 1:
        return runs[0]
    starts = np.cumsum([0, *(len(run) for run in runs[:-1])]).astype(np.int32)
    return Fired(
        ids=np.concatenate([run.ids for run in runs]),
        token=np.concatenate([run.token + start for run, start in zip(runs, starts, strict=True)]),
        row=np.concatenate([run.row for run in runs]),
        value=np.concatenate([run.value for run in runs]),
        probe=np.concatenate([run.probe for run in runs]),
        finite=all(run.finite for run in runs),
    )
