"""One encode per hook point over all rows of a step, and the cut of what fired into requests."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.kernels.contract import Encoded, Encoder, EncodeRows
from guard.kernels.cpu import CpuEncoder
from guard.kernels.stacked import StackedRows
from guard.pack.loader import HookPointRows
from guard.tap.vllm.fired import Fired

_FEW = 16  # tokens up to which one cut for all hook points is faster than one for each


class BatchEncoder:
    """Encodes the activations of a step, those of all requests at once."""

    def __init__(self, encoder: Encoder, hook_points: Sequence[HookPointRows]) -> None:
        self.encoder = encoder
        self.rows = [EncodeRows.of(point, torch.from_numpy) for point in hook_points]
        # A launch on a device takes its time whatever the number of tokens; on the CPU it is the tokens that do.
        self._stacked = StackedRows(self.rows, encoder) if isinstance(encoder, CpuEncoder) else None
        self._offsets = np.cumsum([0, *(len(point.latents) for point in hook_points)])

    @torch.inference_mode()
    def __call__(self, activations: Sequence[Tensor], ids: NDArray[np.int32], lengths: Sequence[int]) -> list[Fired]:
        """What fired in each request: `lengths` are their tokens, which stand one behind the other.

        `activations` are those of each hook point `[T, d_model]`, `ids` the tokens `[T]`. What is not finite spoils its
        own request only.
        """
        bounds = np.cumsum([0, *lengths])
        if self._stacked is not None and len(ids) <= _FEW:
            whole = self._stacked.encode(activations)
            if whole is not None:
                return _split(_fired(ids, whole.token, whole.row, whole.value, whole.probe), bounds)
        encoded = [self.encoder(x, rows) for x, rows in zip(activations, self.rows, strict=True)]
        if all(part.finite for part in encoded):
            return _split(self._join(encoded, ids), bounds)
        apart = []
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            own = [self.encoder(x[begin:end], rows) for x, rows in zip(activations, self.rows, strict=True)]
            apart.append(self._join(own, ids[begin:end]))
        return apart

    def _join(self, encoded: Sequence[Encoded], ids: NDArray[np.int32]) -> Fired:
        finite = all(part.finite for part in encoded)
        parts = encoded if finite else [_nothing(part) for part in encoded]
        token = np.concatenate([np.asarray(part.token) for part in parts])
        order = np.argsort(token, kind="stable")  # by token, then hook point
        row = np.concatenate([np.asarray(part.row) + off for part, off in zip(parts, self._offsets, strict=False)])
        value = np.concatenate([np.asarray(part.value) for part in parts])
        probe = np.concatenate([np.asarray(part.probe) for part in encoded], axis=1)
        return _fired(ids, token[order], row[order], value[order], probe, finite=finite)


def _fired(ids: Any, token: Any, row: Any, value: Any, probe: Any, *, finite: bool = True) -> Fired:
    """In the dtypes that are told."""
    return Fired(
        ids,
        token.astype(np.int32),
        row.astype(np.int32),
        value.astype(np.float32, copy=False),
        probe.astype(np.float32, copy=False),
        finite,
    )


def _nothing(part: Encoded) -> Encoded:
    empty = np.empty(0, dtype=np.int64)
    return Encoded(empty, empty, np.empty(0, dtype=np.float32), part.probe, finite=False)


def _split(whole: Fired, bounds: NDArray[np.int64]) -> list[Fired]:
    hits = np.searchsorted(whole.token, bounds)
    return [
        Fired(
            whole.ids[begin:end],
            whole.token[first:last] - begin,
            whole.row[first:last],
            whole.value[first:last],
            whole.probe[begin:end],
        )
        for begin, end, first, last in zip(
            bounds[:-1].tolist(), bounds[1:].tolist(), hits[:-1].tolist(), hits[1:].tolist(), strict=True
        )
    ]
