"""The CPU encoders: blocks of tokens against a table of rows, each block cut while its pre-activations are in cache.

Rows and probe rows stand in one table, laid out once as oneDNN's products read it, so that no call arranges it anew.
No dense `[T, K]` is ever held: one `[block, K]` is made, cut, and thrown away, whatever the length of the text.
"""

import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guard.errors import ConfigError
from guard.kernels.contract import Encoded, EncodeRows, check_shape, not_finite

_BLOCK_BYTES = 1 << 20  # of pre-activations: a core's second-level cache, or half of one


class CpuEncoder:
    """`dtype` float32 keeps the contract's precision, and is the backend `cpu`.

    bfloat16 (`cpu-bf16`) rounds rows and activations to it once. Their products are summed in float32 with the bias
    less the threshold, so that a hit is a matter of that sum's sign, which no later rounding changes; what is left of
    a value above its threshold, and a probe, then carry an error of up to 2^-8 of themselves.

    Tables are made at first sight of rows and stay for as long as the caller keeps those. Raises ConfigError for
    bfloat16 where the processor has no instructions for it.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in _NAMES:
            raise ValueError(f"dtype: found {dtype}, expected one of {', '.join(map(str, _NAMES))}")
        if dtype == torch.bfloat16 and not _multiplies_bf16():
            raise ConfigError(
                "encode.backend: found 'cpu-bf16' and a processor without bfloat16 products, expected avx512_bf16 or "
                "amx_bf16 among its instructions, and a torch with oneDNN; 'cpu' needs neither"
            )
        self.name = _NAMES[dtype]
        self._dtype = dtype
        self._held: dict[int, _Table] = {}

    def __call__(self, x: Tensor, rows: EncodeRows) -> Encoded:
        check_shape(x, rows)
        table, x = self._table(rows), x.detach()
        kept, width = table.latents, table.width
        size = max(16, _BLOCK_BYTES // max(1, width * self._dtype.itemsize))
        cells, values, probes = [], [], []
        for start in range(0, len(x), size):
            exact = x[start : start + size].float().contiguous()
            squares = _squares(exact)  # [block]
            if not np.isfinite(squares).all():
                return not_finite(x, rows)
            pre = table.multiply(exact.to(self._dtype))  # [block, K + P]
            cell = np.flatnonzero(table.fired(pre))
            cells.append(cell + start * width)
            values.append(pre.view(-1).take(torch.from_numpy(cell)).float())
            probes.append(pre[:, kept:].float().numpy() * _inverse_rms(squares / max(1, x.shape[1]))[:, None])
        cell = np.concatenate(cells) if cells else np.empty(0, np.int64)
        token, row = (torch.from_numpy(part) for part in np.divmod(cell, max(1, width)))
        value = torch.cat(values) if values else torch.empty(0)
        probe = np.concatenate(probes) if probes else np.empty((0, len(rows.probe_rows)), np.float32)
        return Encoded(
            token=token,
            row=row,
            value=value if table.threshold is not None else value + rows.threshold[row],
            probe=torch.from_numpy(probe) + rows.probe_bias,
            finite=True,
        )

    def _table(self, rows: EncodeRows) -> "_Table":
        key = id(rows)
        if key not in self._held:
            self._held[key] = _Table.of(rows, self._dtype)
            weakref.finalize(rows, self._held.pop, key, None)
        return self._held[key]


@dataclass(frozen=True)
class _Table:
    rows: Tensor  # [K + P, d_model], in oneDNN's own order where `packed`
    bias: Tensor  # [K + P] float32, 0 for probes; less the threshold where that is None
    threshold: np.ndarray | None  # [K + P] float32; None where it is part of the bias
    latents: int
    packed: bool

    @classmethod
    def of(cls, rows: EncodeRows, dtype: torch.dtype) -> "_Table":
        table = torch.cat([rows.enc_rows, rows.probe_rows]).to(dtype)
        packed = torch.backends.mkldnn.is_available() and table.numel() > 0
        folded = dtype != torch.float32
        bias = rows.bias.double() - rows.threshold.double() if folded else rows.bias
        none = torch.zeros(len(rows.probe_rows))
        return cls(
            rows=torch.ops.mkldnn._reorder_linear_weight(table) if packed else table,  # noqa: SLF001 - torch.compile's
            bias=torch.cat([bias.float(), none]),
            threshold=None if folded else torch.cat([rows.threshold, none]).numpy(),
            latents=len(rows.enc_rows),
            packed=packed,
        )

    @property
    def width(self) -> int:
        return len(self.bias)

    def multiply(self, x: Tensor) -> Tensor:
        """`[T, K + P]` of `x [T, d_model]`, both in the dtype of the table."""
        if self.packed:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.rows, self.bias, "none", [], "")  # noqa: SLF001
            return product
        return torch.addmm(self.bias.to(x.dtype), x, self.rows.T)

    def fired(self, pre: Tensor) -> np.ndarray:
        """`[T, K + P]` bool. numpy compares and looks for what is true several times faster than torch does."""
        # The sign of a bfloat16 is that of its bits, which numpy compares as whole numbers.
        limit, bits = (0, pre.view(torch.int16)) if self.threshold is None else (self.threshold, pre)
        fired: np.ndarray = bits.numpy() > limit
        fired[:, self.latents :] = False  # probes
        return fired


_NAMES = {torch.float32: "cpu", torch.bfloat16: "cpu-bf16"}


def _multiplies_bf16() -> bool:
    has = torch.cpu.get_capabilities()
    return (
        torch.backends.mkldnn.is_available()
        and bool(has.get("avx512_bf16") or has.get("amx_bf16"))
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - oneDNN may be kept from using them
    )


def _squares(x: Tensor) -> np.ndarray:
    """`[T]`, each token's sum of squares; finite where the contract calls the token representable."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares: np.ndarray = np.vecdot(x.numpy(), x.numpy())
        return squares


def _inverse_rms(mean: np.ndarray) -> np.ndarray:
    """The contract's `inverse_rms` of mean squares `[T]`."""
    return np.where(mean > 0, 1 / np.sqrt(np.maximum(mean, np.float32(1e-12))), np.float32(0))
