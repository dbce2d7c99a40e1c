"""Few tokens, several hook points, one cut: what a decode step on a CPU needs.

With a handful of tokens the encoder's time is that of starting its operations, some fifteen at each hook point. Here
each hook point has its product and nothing else of its own: pre-activations of all of them stand side by side and are
cut at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from guard.kernels.contract import Encoded, EncodeRows
from guard.kernels.cpu import CpuEncoder, inverse_rms, squares, wide


class StackedRows:
    """Rows of several hook points of one width, in tables of `encoder`. Raises ValueError where the widths differ."""

    def __init__(self, hook_points: Sequence[EncodeRows], encoder: CpuEncoder | None = None) -> None:
        widths = sorted({rows.enc_rows.shape[1] for rows in hook_points})
        if len(widths) != 1:
            raise ValueError(f"rows: found d_model {widths}, expected one width for all hook points")
        self._encoder = encoder or CpuEncoder()
        tables = [self._encoder.table(rows) for rows in hook_points]
        self._tables, self._folded = tables, self._encoder.dtype != torch.float32
        self._threshold = np.concatenate([table.threshold for table in tables])  # [C], infinite for probes
        latent = np.isfinite(self._threshold)
        self._least = np.where(latent, 0, np.iinfo(np.int16).max).astype(np.int16) if self._folded else self._threshold
        self._row = np.cumsum(latent) - 1  # [C] numbered through all hook points
        self._probes = np.flatnonzero(~latent)  # [P] columns
        self._hook = np.repeat(np.arange(len(tables)), [len(table.probe_bias) for table in tables])  # [P]
        self._probe_bias = np.concatenate([table.probe_bias for table in tables])  # [P]

    def encode(self, activations: Sequence[Tensor]) -> Encoded | None:
        """`activations` of each hook point `[T, D]` on the CPU; rows and probes are numbered through all of them.

        In order of token and then row. None where an activation is not `representable` (see the contract): then the
        encoder says whose.
        """
        with _one_thread():
            x = torch.stack(tuple(activations))  # [H, T, D]
            square = squares(x.float().flatten(0, 1)).reshape(x.shape[:2])  # [H, T]
            if not np.isfinite(square).all():
                return None
            parts = x.to(self._encoder.dtype).unbind()
            products = [table.multiply(part) for table, part in zip(self._tables, parts, strict=True)]
        pre = np.concatenate(products, axis=1)  # [T, C]
        cell = (pre > self._least).ravel().nonzero()[0]
        token, column = np.divmod(cell, pre.shape[1])
        value = wide(pre.ravel()[cell])
        probe = wide(pre[:, self._probes]) * inverse_rms(square / x.shape[2]).T[:, self._hook] + self._probe_bias
        return Encoded(
            token, self._row[column], value + self._threshold[column] if self._folded else value, probe, finite=True
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products this small gain little from a second thread, and wait for it where cores are busy with others' work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
