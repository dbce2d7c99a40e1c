"""Few tokens, several hook points, one product: what a decode step on a CPU needs.

With a handful of tokens the encoder's time is that of starting its operations, some fifteen at each hook point. Rows
and probe rows of all hook points stand side by side here, and all of them take one batched product.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.kernels.contract import Encoded, EncodeRows


class StackedRows:
    """Rows of several hook points of one width. Raises ValueError where the widths differ."""

    def __init__(self, hook_points: Sequence[EncodeRows]) -> None:
        widths = sorted({rows.enc_rows.shape[1] for rows in hook_points})
        if len(widths) != 1:
            raise ValueError(f"rows: found d_model {widths}, expected one width for all hook points")
        self.columns = max(len(rows.enc_rows) + len(rows.probe_rows) for rows in hook_points)
        self._table = torch.zeros(len(hook_points), widths[0], self.columns)  # [H, D, C]
        self._bias = torch.zeros(len(hook_points), 1, self.columns)
        self._threshold = np.full((len(hook_points), self.columns), np.inf, np.float32)
        self._row = np.full((len(hook_points), self.columns), -1, np.int64)  # numbered through all hook points
        probes, biases, first = list[tuple[int, int]](), list[Tensor](), 0
        for hook, rows in enumerate(hook_points):
            kept, used = len(rows.enc_rows), len(rows.enc_rows) + len(rows.probe_rows)
            self._table[hook, :, :kept] = torch.as_tensor(rows.enc_rows).T
            self._table[hook, :, kept:used] = torch.as_tensor(rows.probe_rows).T
            self._bias[hook, 0, :kept] = torch.as_tensor(rows.bias)
            self._threshold[hook, :kept] = rows.threshold
            self._row[hook, :kept] = np.arange(first, first + kept)
            probes += [(hook, column) for column in range(kept, used)]
            biases.append(torch.as_tensor(rows.probe_bias))
            first += kept
        self._probe_hook, self._probe_column = np.array(probes, np.int64).reshape(-1, 2).T
        self._probe_bias = torch.cat(biases).numpy()[:, None]  # [P, 1]

    def encode(self, activations: Sequence[Tensor]) -> Encoded | None:
        """`activations` of each hook point `[T, D]` on the CPU; rows and probes are numbered through all of them.

        In order of token and then row. None where an activation is not `representable` (see the contract): then the
        encoder says whose.
        """
        x = torch.stack(tuple(activations)).float()  # [H, T, D]
        square = x.square().sum(dim=2).numpy()  # [H, T]
        if not np.isfinite(square).all():
            return None
        pre: NDArray[np.float32] = torch.baddbmm(self._bias, x, self._table).numpy().transpose(1, 0, 2)  # [T, H, C]
        token, hook, column = np.nonzero(pre > self._threshold)
        mean = square / x.shape[2]
        inverse = np.where(mean > 0, 1 / np.sqrt(np.maximum(mean, 1e-12)), 0).astype(np.float32)  # [H, T]
        probe = pre[:, self._probe_hook, self._probe_column].T * inverse[self._probe_hook] + self._probe_bias  # [P, T]
        return Encoded(token, self._row[hook, column], pre[token, hook, column], probe.T, finite=True)
