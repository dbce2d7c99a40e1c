"""Cases of the GPU benchmark: random rows of real shapes, what is measured on them, and whether it is right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guard.kernels.contract import EncodeRows

if TYPE_CHECKING:
    from guard.kernels.gpu import FusedPool

DTYPE = torch.bfloat16
FIRING = 0.01  # share of pre-activations that fire: thresholds are set for it
STREAMS, SLOTS = 64, 256
PROBES = 3
CLOSE = 1e-5  # of its threshold: a pre-activation this near may fire or not, as the order of additions decides


@dataclass(frozen=True)
class Shape:
    d_model: int
    rows: tuple[int, ...]  # of each hook point
    width: int  # of the whole SAE


SHAPES = {
    "SmolLM2-135M": Shape(576, (400, 400, 400, 400), 9216),
    "Qwen2.5-3B, Safe-SAIL": Shape(2048, (479, 502, 397, 218, 162), 20480),
    "Llama-70B-like": Shape(8192, (1000,), 65536),
}


@dataclass(frozen=True)
class Case:
    """`fused` adds to `pool`; everything reads `x [hook points, T, D]` in bfloat16."""

    name: str
    tokens: int
    x: Tensor
    slots: Tensor  # [T] int32
    rows: Sequence[EncodeRows]  # rounded to bfloat16, held in float32
    scales: Sequence[Tensor]
    pool: "FusedPool"
    fused: Callable[[], object]
    bare: Callable[[], object]
    eager: Callable[[], object]
    full: Callable[[], object]

    @property
    def bytes_read(self) -> int:
        return 2 * (self.x.numel() + sum(r.enc_rows.numel() + r.probe_rows.numel() for r in self.rows))

    @property
    def flops(self) -> int:
        return sum(2 * self.tokens * (r.enc_rows.numel() + r.probe_rows.numel()) for r in self.rows)


def make_case(name: str, tokens: int) -> Case:
    from guard.kernels.columns import Columns
    from guard.kernels.gpu import FusedPool

    shape = SHAPES[name]
    generator = torch.Generator(device="cuda").manual_seed(tokens)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", generator=generator)

    x = normal(len(shape.rows), tokens, shape.d_model).to(DTYPE)
    order = torch.arange(tokens, device="cuda", dtype=torch.int32)
    slots = order if tokens <= SLOTS else order * STREAMS // tokens  # decode: a stream each; prefill: texts in a row
    at = torch.special.ndtri(torch.tensor(1 - FIRING)).item() * shape.d_model**0.5
    rows = [
        EncodeRows(
            enc_rows=normal(count, shape.d_model).to(DTYPE).float(),
            bias=normal(count),
            threshold=torch.full((count,), at, device="cuda"),
            probe_rows=normal(PROBES, shape.d_model).to(DTYPE).float(),
            probe_bias=normal(PROBES),
        )
        for count in shape.rows
    ]
    scales = [own.threshold * 1.5 for own in rows]
    pool = FusedPool(Columns.on("cuda", _on_cpu(rows), scales=[s.cpu() for s in scales], dtype=DTYPE), SLOTS)
    sliced = [own.enc_rows.to(DTYPE) for own in rows]
    probing = [own.probe_rows.to(DTYPE) for own in rows]
    whole = [normal(shape.width, shape.d_model).to(DTYPE) for _ in rows]
    sums = [torch.zeros(SLOTS, len(own.enc_rows), device="cuda") for own in rows]

    def bare() -> None:
        for part, own in zip(x, sliced, strict=True):
            part @ own.T

    def full() -> None:
        for part, own in zip(x, whole, strict=True):
            part @ own.T

    def eager() -> None:
        """Product, threshold, nonzero and pooling as one writes them in torch."""
        for part, own, table, probe, total, scale in zip(x, rows, sliced, probing, sums, scales, strict=True):
            pre = (part @ table.T).float() + own.bias
            token, row = (pre > own.threshold).nonzero(as_tuple=True)
            strength = ((pre[token, row] - own.threshold[row]) / (scale - own.threshold)[row]).clamp(0, 1)
            total.index_put_((slots[token].long(), row), strength, accumulate=True)
            wide = part.float()
            (part @ probe.T).float() * wide.square().mean(dim=1, keepdim=True).rsqrt() + own.probe_bias

    return Case(name, tokens, x, slots, rows, scales, pool, lambda: pool(x, slots), bare, eager, full)


def _on_cpu(rows: Sequence[EncodeRows]) -> list[EncodeRows]:
    return [
        EncodeRows(
            enc_rows=r.enc_rows.cpu(),
            bias=r.bias.cpu(),
            threshold=r.threshold.cpu(),
            probe_rows=r.probe_rows.cpu(),
            probe_bias=r.probe_bias.cpu(),
        )
        for r in rows
    ]


def disagreement(case: Case, work: Callable[[], object] | None = None) -> str:
    """Why the pooled sums that one call adds are not those of the fp32 reference; empty where they are.

    Rows are rounded to bfloat16 on both sides, products of them are exact in float32: only the sums' order differs.
    """
    for part in (case.pool.pool.sums, case.pool.pool.counts, case.pool.pool.probe_sums, case.pool.pool.tokens):
        part.zero_()
    (work or case.fused)()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        counts, sure, sums, probes = _expected(case)
    finally:
        torch.set_float32_matmul_precision(precision)
    found = case.pool.pool
    if bool(found.spoiled.any()):
        return "activations were called not finite"
    off = (found.counts < sure) | (found.counts > counts)
    if bool(off.any()):
        return f"counts differ from the reference's in {int(off.sum())} of {off.numel()} places"
    error = (found.strengths() - sums).abs()  # a gate rises from 0: doubtful hits add nothing
    if float(error.max()) > 1e-3:
        return f"pooled sums: largest error {float(error.max()):.2g}, expected 1e-3"
    error = (found.probe_sums - probes).abs()
    if float(error.max()) > 1e-2:
        return f"probe sums: largest error {float(error.max()):.2g}, expected 1e-2"
    return ""


def _expected(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts `[S, K]` with and without the doubtful hits, sums of strengths `[S, K]`, and of probes `[S, P]`."""
    streams, home = len(case.pool.pool.tokens), case.slots.long()
    counted, certain, summed, probed = [], [], [], []
    for part, own, scale in zip(case.x.float(), case.rows, case.scales, strict=True):
        pre = part @ own.enc_rows.T + own.bias  # [T, K]
        margin = CLOSE * own.threshold
        strength = ((pre - own.threshold) / (scale - own.threshold)).clamp(0, 1).double()
        blank = torch.zeros(streams, pre.shape[1], dtype=torch.float64, device=pre.device)
        counted.append(blank.index_add(0, home, (pre > own.threshold - margin).double()))
        certain.append(blank.index_add(0, home, (pre > own.threshold + margin).double()))
        summed.append(blank.index_add(0, home, strength))
        rms = part.square().mean(dim=1, keepdim=True).sqrt()
        probe = ((part / rms) @ own.probe_rows.T + own.probe_bias).double()
        probed.append(
            torch.zeros(streams, probe.shape[1], dtype=torch.float64, device=pre.device).index_add(0, home, probe)
        )
    return torch.cat(counted, 1), torch.cat(certain, 1), torch.cat(summed, 1), torch.cat(probed, 1)
