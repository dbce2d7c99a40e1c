"""The CPU encoders: blocks of tokens against a table of rows, each block cut while its pre-activations are in cache.

Rows and probe rows stand in one table, laid out once as oneDNN's products read it, so that no call arranges it anew.
No dense `[T, K]` is ever held: one `[block, K]` is made, cut, and thrown away, whatever the length of the text.
"""

import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from guard import onednn
from guard.errors import ConfigError
from guard.kernels.contract import Encoded, EncodeRows, check_shape, not_finite

_BLOCK_BYTES = 1 << 20  # of pre-activations: a core's second-level cache, or half of one
_STEP = 16  # tokens


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
        self.dtype = dtype
        self._held: dict[int, Table] = {}

    def __call__(self, x: Tensor, rows: EncodeRows) -> Encoded:
        check_shape(x, rows)
        table, x = self.table(rows), x.detach()
        kept, width = table.latents, table.width
        most = max(_STEP, _BLOCK_BYTES // max(1, width * self.dtype.itemsize))
        size = onednn.padded(most * 15 // 16)  # which products take as it is
        cells, values, probes = [], [], []
        for start in range(0, len(x), size):
            part = (x if len(x) <= size else x[start : start + size]).contiguous()
            taken = part.to(self.dtype)
            square = squares(taken if self.dtype == torch.float32 else part)  # [block]
            if not np.isfinite(square).all():
                return not_finite(x, rows)
            pre = table.multiply(taken)  # [block, K + P] float32, or a bfloat16's bits as int16
            cell = table.fired(pre).ravel().nonzero()[0]
            cells.append(cell + start * width)
            values.append(wide(pre.ravel()[cell]))
            probes.append(wide(pre[:, kept:]) * inverse_rms(square / max(1, x.shape[1]))[:, None])
        token, row = np.divmod(_joined(cells, np.empty(0, np.int64)), max(1, width))
        value = _joined(values, np.empty(0, np.float32))
        probe = _joined(probes, np.empty((0, len(table.probe_bias)), np.float32)) + table.probe_bias
        return Encoded(
            token=torch.from_numpy(token),
            row=torch.from_numpy(row),
            value=torch.from_numpy(value + table.threshold[row] if table.folded else value),
            probe=torch.from_numpy(probe),
            finite=True,
        )

    def table(self, rows: EncodeRows) -> "Table":
        """These rows as they are multiplied by, made at first sight of them."""
        key = id(rows)
        if key not in self._held:
            self._held[key] = Table.of(rows, self.dtype)
            weakref.finalize(rows, self._held.pop, key, None)
        return self._held[key]


@dataclass(frozen=True)
class Table:
    rows: Tensor  # [K + P, d_model], in oneDNN's own order where `packed`
    bias: Tensor  # [K + P] float32, 0 for probes; less the threshold where `folded`
    threshold: np.ndarray  # [K + P] float32, infinite for probes
    probe_bias: np.ndarray  # [P] float32
    latents: int
    folded: bool
    packed: bool

    @classmethod
    def of(cls, rows: EncodeRows, dtype: torch.dtype) -> "Table":
        table = torch.cat([rows.enc_rows, rows.probe_rows]).to(dtype)
        packed = onednn.can_lay_out(dtype) and table.numel() > 0
        folded = dtype != torch.float32
        bias = rows.bias.double() - rows.threshold.double() if folded else rows.bias
        probes = torch.zeros(len(rows.probe_rows))
        return cls(
            rows=onednn.lay_out(table) if packed else table,
            bias=torch.cat([bias.float(), probes]),
            threshold=torch.cat([rows.threshold, probes + torch.inf]).numpy(),
            probe_bias=rows.probe_bias.numpy(),
            latents=len(rows.enc_rows),
            folded=folded,
            packed=packed,
        )

    @property
    def width(self) -> int:
        return len(self.bias)

    def multiply(self, x: Tensor) -> np.ndarray:
        """`[T, K + P]` of `x [T, d_model]` in the dtype of the table; bfloat16 as the int16 of its bits."""
        if self.packed:
            product = onednn.product(x, self.rows, self.bias)
        else:
            product = torch.addmm(self.bias.to(x.dtype), x, self.rows.T)
        array: np.ndarray = (product.view(torch.int16) if self.folded else product).numpy()
        return array

    def fired(self, pre: np.ndarray) -> np.ndarray:
        """`[T, K + P]` bool. numpy compares and looks for what is true several times faster than torch does."""
        fired: np.ndarray = pre > (0 if self.folded else self.threshold)  # a bfloat16 has the sign of its bits
        fired[:, self.latents :] = False  # probes
        return fired


_NAMES = {torch.float32: "cpu", torch.bfloat16: "cpu-bf16"}


def _multiplies_bf16() -> bool:
    has = torch.cpu.get_capabilities()
    instructions = bool(has.get("avx512_bf16") or has.get("amx_bf16"))
    return instructions and onednn.can_lay_out(torch.bfloat16)


def squares(x: Tensor) -> np.ndarray:
    """`[T]`, each token's sum of squares; finite where the contract calls the token representable."""
    if x.dtype == torch.bfloat16:  # widened as it is read: a float32 copy costs more than the sum
        summed: np.ndarray = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square().numpy()
        return summed
    array = x.float().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        squares: np.ndarray = np.vecdot(array, array)
    return squares


def inverse_rms(mean: np.ndarray) -> np.ndarray:
    """The contract's `inverse_rms` of mean squares `[T]`."""
    inverse: np.ndarray = (mean > 0) / np.sqrt(np.maximum(mean, np.float32(1e-12)))
    return inverse


def wide(values: np.ndarray) -> np.ndarray:
    """float32 of float32, or of a bfloat16's bits, which are the upper half of it."""
    return values if values.dtype == np.float32 else (values.astype(np.int32) << 16).view(np.float32)


def _joined(parts: list[np.ndarray], none: np.ndarray) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate([none, *parts])
