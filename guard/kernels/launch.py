"""Launches of the fused kernel: buffers of fixed shapes, no word from the device, so a CUDA graph can hold them.

What a launch leaves on the device is read outside the graph, through `HitBuffer`, `Pool` and `Status`.
"""

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from guard.kernels import fused
from guard.kernels.columns import Columns

DECODE_TOKENS = 256  # up to here the time is that of reading the rows; above, that of the product

Buffers = TypeVar("Buffers", "HitBuffer", "Pool")

_HALVES = (torch.float16, torch.bfloat16)
_warmed: set[tuple[object, ...]] = set()


@dataclass(frozen=True)
class HitBuffer:
    """Where hits go, in no order. Beyond `capacity` they are counted in the status and not written."""

    cell: Tensor  # [capacity] int32, token * rows + row, with the rows of all hook points numbered through
    value: Tensor  # [capacity] float32, the pre-activation
    probe: Tensor  # [T, P] float32

    @classmethod
    def on(cls, columns: Columns, tokens: int, capacity: int) -> "HitBuffer":
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=columns.device)

        return cls(
            cell=empty(capacity, dtype=torch.int32),
            value=empty(capacity, dtype=torch.float32),
            probe=empty(tokens, columns.probes, dtype=torch.float32),
        )

    @property
    def capacity(self) -> int:
        return len(self.value)


@dataclass(frozen=True)
class Pool:
    """The running sums of S streams, as `guard.scoring.pooling.Pool` keeps them for one.

    Strengths are added as whole numbers, so `sums` and `counts` are the same to the last bit for any chunking, tiling
    or order. Probe values are added in float64.
    """

    sums: Tensor  # [S, K] int64, in units of 1 / fused.UNIT
    counts: Tensor  # [S, K] int32, tokens on which each latent fired
    probe_sums: Tensor  # [S, P] float64
    tokens: Tensor  # [S] int64
    spoiled: Tensor  # [S] int32, 1 from the first activation on that is not `representable`: the slot is then void

    @classmethod
    def on(cls, columns: Columns, slots: int) -> "Pool":
        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=columns.device)

        return cls(
            sums=zeros(slots, columns.latents, dtype=torch.int64),
            counts=zeros(slots, columns.latents, dtype=torch.int32),
            probe_sums=zeros(slots, columns.probes, dtype=torch.float64),
            tokens=zeros(slots, dtype=torch.int64),
            spoiled=zeros(slots, dtype=torch.int32),
        )

    def clear(self, slots: Tensor) -> None:
        """Makes slots `[n]` int64 ready for new streams."""
        for part in fields(self):
            getattr(self, part.name).index_fill_(0, slots, 0)

    def strengths(self) -> Tensor:
        """`[S, K]` float64, the sums in units of a gate's strength."""
        return self.sums.double() / fused.UNIT


@dataclass(frozen=True)
class Status:
    """What the last launch met, read from the device: this waits for it."""

    hits: int  # how many fired, written or not
    finite: bool  # False where any activation of a live token was not `representable`
    stray: int  # tokens whose slot does not exist; they were left out

    @classmethod
    def read(cls, status: Tensor) -> "Status":
        told = status.tolist()
        return cls(told[fused.HITS], not told[fused.NOT_FINITE], told[fused.STRAY])


def new_status(columns: Columns) -> Tensor:
    return torch.zeros(fused.STATUS, dtype=torch.int32, device=columns.device)


def launch(
    x: Tensor,
    columns: Columns,
    status: Tensor,
    *,
    hits: HitBuffer | None = None,
    pool: Pool | None = None,
    slots: Tensor | None = None,
    path: str | None = None,
) -> str:
    """Encodes `x [T, D]`, or `[hook points, T, D]` where there are several. Says which path ran: prefill or decode.

    `slots [T]` int32 names each token's stream; a negative one marks a token that is not there, so that a graph made
    for 256 tokens serves fewer. A first launch of a kind compiles and tunes, on copies; it raises RuntimeError under
    graph capture. ValueError: shapes or dtypes that do not fit. With no tokens, nothing is launched but the reset.
    """
    x = x.unsqueeze(0) if x.dim() == 2 else x
    tokens = _check(x, columns, hits, pool, slots)
    status.zero_()
    chosen = path or ("decode" if tokens <= DECODE_TOKENS else "prefill")
    if not tokens:
        return chosen
    if not fused.INTERPRETED:
        _warm(x, columns, status, hits, pool, slots, chosen)
    _run(x, columns, status, hits, pool, slots, chosen)
    return chosen


def _check(x: Tensor, columns: Columns, hits: HitBuffer | None, pool: Pool | None, slots: Tensor | None) -> int:
    wanted = [columns.hook_points, "T", columns.d_model]
    if x.dim() != 3 or x.shape[0] != columns.hook_points or x.shape[2] != columns.d_model:
        raise ValueError(f"activations: found shape {list(x.shape)}, expected {wanted}")
    if x.dtype not in (*_HALVES, torch.float32) or (columns.d_model > 1 and x.stride(2) != 1):
        raise ValueError(
            f"activations: found {x.dtype} of strides {x.stride()}, expected floats of 16 or 32 bits in rows"
        )
    tokens = x.shape[1]
    if tokens * max(1, columns.latents) >= 2**31:
        raise ValueError(f"activations: found {tokens} tokens, expected fewer than 2**31 / {columns.latents} rows")
    if hits is not None and len(hits.probe) < tokens:
        raise ValueError(f"hit buffer: found room for {len(hits.probe)} tokens, expected {tokens}")
    if pool is not None and (slots is None or slots.shape != (tokens,) or slots.dtype != torch.int32):
        found = None if slots is None else f"{slots.dtype} {list(slots.shape)}"
        raise ValueError(f"slots: found {found}, expected torch.int32 [{tokens}]")
    return tokens


def _warm(
    x: Tensor,
    columns: Columns,
    status: Tensor,
    hits: HitBuffer | None,
    pool: Pool | None,
    slots: Tensor | None,
    path: str,
) -> None:
    """Compiles and tunes once for each kind of launch, on copies: trials must not add to anybody's sums."""
    # All that Triton compiles or tunes anew for: see `do_not_specialize` and the tuners' key.
    aligned = (x.data_ptr() % 16 == 0, x.stride(0) % 16 == 0 or len(x) == 1, x.stride(1))
    shapes = (path, _bucket(x.shape[1]), columns.rows.shape, columns.d_model, hits is not None, pool is not None)
    kind = (*shapes, *aligned, x.dtype, columns.rows.dtype, x.device)
    if kind in _warmed:
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"encode of {x.shape[1]} tokens: found a graph capture, expected one launch before it")
    mine = None if hits is None else _like(hits)
    sums = None if pool is None else _like(pool)
    _run(x, columns, status.clone(), mine, sums, slots, path)
    _warmed.add(kind)


def _like(buffers: Buffers) -> Buffers:
    return replace(buffers, **{f.name: torch.zeros_like(getattr(buffers, f.name)) for f in fields(buffers)})


def _run(
    x: Tensor,
    columns: Columns,
    status: Tensor,
    hits: HitBuffer | None,
    pool: Pool | None,
    slots: Tensor | None,
    path: str,
) -> None:
    tokens, width = x.shape[1], len(columns.rows)
    halves = x.dtype in _HALVES and (x.dtype == columns.rows.dtype or columns.gain is not None)
    widen = not halves or (fused.INTERPRETED and x.dtype == torch.bfloat16)  # numpy has no bfloat16 to multiply
    run = fused.decode if path == "decode" else fused.prefill

    def grid(sizes: dict[str, int]) -> tuple[int, int]:
        return width // sizes["BLOCK_K"], -(-tokens // sizes["BLOCK_T"])

    run[grid](
        x,
        columns.rows,
        columns.gain,
        columns.bias,
        columns.threshold,
        columns.rise,
        columns.index,
        columns.blocks,
        status,
        *((hits.cell, hits.value, hits.probe) if hits is not None else [None] * 3),
        slots if pool is not None else None,
        *((pool.sums, pool.counts, pool.probe_sums, pool.tokens, pool.spoiled) if pool is not None else [None] * 5),
        tokens,
        _bucket(tokens),
        width,
        x.stride(0) if len(x) > 1 else 0,
        x.stride(1),
        columns.rows.stride(0),
        hits.capacity if hits is not None else 0,
        columns.latents,
        columns.probes,
        len(pool.tokens) if pool is not None else 0,
        D=columns.d_model,
        HITS=hits is not None,
        POOL=pool is not None,
        SCALED=columns.gain is not None,
        WIDEN=widen,
        PRECISION="ieee",
    )


def _bucket(tokens: int) -> int:
    """The next power of two: what is tuned for 1,500 tokens serves 2,000."""
    return 1 << (tokens - 1).bit_length()
