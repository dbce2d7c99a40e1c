"""Rows of one or several hook points as the fused kernel reads them: moved to the device once, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guard.kernels.contract import EncodeRows
from guard.kernels.fused import GRAIN

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_DEPTH = 256  # the deepest tile of any configuration: rows padded to it need no mask


@dataclass(frozen=True)
class Columns:
    """A hook point's rows, its probe rows, zeros up to a multiple of GRAIN; then the next hook point's.

    Hits carry a row's number through all hook points in their order, as a pack numbers them; so do probes.
    """

    rows: Tensor  # [C, D padded] in the dtype that they are kept in
    gain: Tensor | None  # [C] float32, what a row of 8 bits is multiplied by; None for floats of 16 or 32
    bias: Tensor  # [C] float32
    threshold: Tensor  # [C] float32, infinite where the column is no latent
    rise: Tensor  # [C] float32, scale less threshold; 1 where there is no scale
    index: Tensor  # [C] int32, the row's number in the pack, or the probe's; -1 for padding
    blocks: Tensor  # [C / GRAIN, 4] int32: hook point, where its probes begin, where they end, what tiles must cover
    hook_points: int
    d_model: int
    latents: int  # of all hook points together
    probes: int

    @classmethod
    def on(
        cls,
        device: torch.device | str,
        hook_points: Sequence[EncodeRows],
        *,
        scales: Sequence[Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "Columns":
        """Raises ValueError where the hook points differ in width, or a scale is not above its threshold.

        `scales [K]` of each hook point end the rise of its gates; only pooled sums need them. `dtype` float32 keeps
        the contract's precision. A half dtype rounds every row once and multiplies activations of that same dtype on
        tensor cores, sums still being float32. int8 and float8_e4m3fn round each row by its own gain (`rounded`), and
        multiply in the activations' dtype, which holds them exactly.
        """
        widths = sorted({rows.enc_rows.shape[1] for rows in hook_points})
        if len(widths) != 1:
            raise ValueError(f"rows: found d_model {widths}, expected one width for all hook points")
        parts: list[tuple[Tensor, ...]] = []
        blocks: list[tuple[int, int, int, int]] = []
        latents = probes = 0
        for hook, rows in enumerate(hook_points):
            begin = len(blocks) * GRAIN
            rise = _rise(rows, scales[hook] if scales is not None else None)
            parts.append(_side_by_side(rows, rise, latents, probes))
            middle = begin + len(rows.enc_rows)
            end = middle + len(rows.probe_rows)
            shape = (hook, middle, end, max(end, begin + 1))  # one tile at least looks at the activations
            blocks += [shape] * (len(parts[-1][0]) // GRAIN)
            latents, probes = latents + len(rows.enc_rows), probes + len(rows.probe_rows)
        joined = [torch.cat(part) for part in zip(*parts, strict=True)]
        table, gain = rounded(joined[0], dtype)
        joined = [part.to(device) for part in joined]
        return cls(
            rows=table.to(device),
            gain=None if gain is None else gain.to(device),
            bias=joined[1],
            threshold=joined[2],
            rise=joined[3],
            index=joined[4],
            blocks=torch.tensor(blocks, dtype=torch.int32).to(device),
            hook_points=len(hook_points),
            d_model=widths[0],
            latents=latents,
            probes=probes,
        )

    @property
    def device(self) -> torch.device:
        return self.rows.device


def rounded(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Rows `[C, D]` in `dtype`, and for 8 bits each row's gain `[C]`: its largest entry over the dtype's largest value.

    `rows.float() * gain[:, None]` is then what is multiplied. Raises ValueError for a dtype that no row is kept in.
    """
    if dtype in {torch.float32, torch.float16, torch.bfloat16}:
        return rows.to(dtype), None
    if dtype not in _LARGEST:
        raise ValueError(f"rows: found dtype {dtype}, expected a float of 16 or 32 bits, or one of {list(_LARGEST)}")
    gain = (rows.abs().amax(dim=1) / _LARGEST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = rows / gain[:, None]
    return (scaled.round() if dtype is torch.int8 else scaled).to(dtype), gain


def _rise(rows: EncodeRows, scale: Tensor | None) -> Tensor:
    """`[K]`."""
    if scale is None:
        return torch.ones(len(rows.enc_rows))
    rise: Tensor = scale.double().cpu() - rows.threshold.double().cpu()
    if not bool((rise > 0).all()):
        row = int((rise <= 0).nonzero()[0])
        raise ValueError(f"scale of row {row}: found {float(scale[row]):g}, expected above its threshold")
    return rise.float()


def _side_by_side(rows: EncodeRows, rise: Tensor, latents: int, probes: int) -> tuple[Tensor, ...]:
    """Rows, bias, threshold, rise and index of one hook point, padded."""
    kept, own = rows.enc_rows.shape[0], rows.probe_rows.shape[0]
    used = kept + own
    width = max(1, -(-used // GRAIN)) * GRAIN
    depth = -(-rows.enc_rows.shape[1] // _DEPTH) * _DEPTH
    table = torch.zeros(width, depth)
    table[:kept, : rows.enc_rows.shape[1]] = rows.enc_rows
    table[kept:used, : rows.enc_rows.shape[1]] = rows.probe_rows
    bias = torch.zeros(width)
    bias[:kept], bias[kept:used] = rows.bias, rows.probe_bias
    threshold = torch.full((width,), torch.inf)
    threshold[:kept] = rows.threshold
    rises = torch.ones(width)
    rises[:kept] = rise
    index = torch.full((width,), -1, dtype=torch.int32)
    index[:kept] = torch.arange(latents, latents + kept)
    index[kept:used] = torch.arange(probes, probes + own)
    return table, bias, threshold, rises, index
