"""Cases of the CPU encoders: random rows of real shapes, what is measured on them, and whether it is right.

Rows and activations are multiples that bfloat16 holds, so that products of either dtype are exact in float32 and all
encoders must give the same hits but where the order of a sum decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from guard.kernels import choice
from guard.kernels.contract import Encoded, Encoder, EncodeRows
from guard.kernels.reference import ReferenceEncoder

DTYPES = {"cpu": torch.float32, "cpu-bf16": torch.bfloat16}
FIRING = 0.015  # share of pre-activations that fire: thresholds are set for it
PROBES = 3
CLOSE = 1e-4  # of its threshold: a pre-activation this near may fire or not
ERROR = {"cpu": 1e-5, "cpu-bf16": 2**-8}  # of a value, as a share of its threshold; of a probe, of the largest


@dataclass(frozen=True)
class Shape:
    d_model: int
    rows: tuple[int, ...]  # of each hook point
    width: int = 0  # of the whole SAE; 0: not measured


SHAPES = {
    "SmolLM2-135M": Shape(576, (420, 420, 420, 420), 9216),
    "Qwen2.5-3B, Safe-SAIL": Shape(2048, (479, 502, 397, 218, 162), 20480),
    "Llama-70B-like": Shape(8192, (1000,)),
}


@dataclass(frozen=True)
class Case:
    x: Sequence[Tensor]  # [T, d_model] float32 of each hook point
    rows: Sequence[EncodeRows]

    @property
    def flops(self) -> int:
        return sum(2 * len(x) * r.enc_rows.numel() for x, r in zip(self.x, self.rows, strict=True))


def make_case(shape: Shape, tokens: int) -> Case:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).bfloat16().float()

    at = torch.special.ndtri(torch.tensor(1 - FIRING)).item() * shape.d_model**0.5
    rows = [
        EncodeRows(
            enc_rows=normal(count, shape.d_model),
            bias=normal(count),
            threshold=torch.full((count,), at),
            probe_rows=normal(PROBES, shape.d_model),
            probe_bias=normal(PROBES),
        )
        for count in shape.rows
    ]
    return Case([normal(tokens, shape.d_model) for _ in rows], rows)


def bare(case: Case, dtype: torch.dtype) -> Callable[[], None]:
    """The library's product of the rows, and nothing else."""
    parts = [(x.to(dtype), r.enc_rows.to(dtype).T) for x, r in zip(case.x, case.rows, strict=True)]

    def work() -> None:
        for x, table in parts:
            x @ table

    return work


def served(case: Case, encoder: Encoder) -> Callable[[], list[tuple[Encoded, np.ndarray]]]:
    """The encoder and the pooled sums of one text, of activations in the encoder's dtype."""
    xs = [x.to(DTYPES[encoder.name]) for x in case.x]
    levels = [r.threshold.numpy() for r in case.rows]

    def work() -> list[tuple[Encoded, np.ndarray]]:
        told = []
        for x, own, level in zip(xs, case.rows, levels, strict=True):
            found = encoder(x, own)
            row = found.row.numpy()
            strength = np.minimum(found.value.numpy() / level[row] * 2 - 2, 1)  # 0 at the threshold, 1 at 1.5 of it
            told.append((found, np.bincount(row, strength, minlength=len(level))))
        return told

    return work


def eager(case: Case, dtype: torch.dtype) -> Callable[[], None]:
    """Product, threshold, nonzero and pooling as one writes them in torch; the probes too."""
    parts = [
        (x.to(dtype), replace(r, enc_rows=r.enc_rows.to(dtype), probe_rows=r.probe_rows.to(dtype)))
        for x, r in zip(case.x, case.rows, strict=True)
    ]

    def work() -> None:
        for x, own in parts:
            pre = (x @ own.enc_rows.T).float() + own.bias
            token, row = (pre > own.threshold).nonzero(as_tuple=True)
            strength = (pre[token, row] / own.threshold[row] * 2 - 2).clamp(max=1)
            torch.zeros(len(own.bias)).index_put_((row,), strength, accumulate=True)
            wide = x.float()
            (x @ own.probe_rows.T).float() * wide.square().mean(dim=1, keepdim=True).rsqrt() + own.probe_bias

    return work


def full(case: Case, width: int) -> Callable[[], None]:
    """Every hook point encoded at its SAE's full width in float32, dense. All hook points share one matrix."""
    table, bias = torch.randn(width, case.x[0].shape[1]), torch.randn(width)
    threshold = torch.full((width,), float(case.rows[0].threshold[0]))

    def work() -> None:
        for x in case.x:
            pre = torch.addmm(bias, x, table.T)
            pre.mul_(pre > threshold)

    return work


def sae_lens(case: Case, width: int) -> Callable[[], None]:
    """The same by sae-lens's own JumpReLU SAE."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=case.x[0].shape[1], d_sae=width))
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.threshold.fill_(float(case.rows[0].threshold[0]))

    def work() -> None:
        for x in case.x:
            sae.encode(x)

    return work


def disagreement(case: Case, name: str) -> str:
    """Why what the encoder says, or the pooled sums of it, are wrong; empty where they are right."""
    told = served(case, choice.choose(name))()
    for x, own, (found, pooled) in zip(case.x, case.rows, told, strict=True):
        truth, pre = ReferenceEncoder()(x, own), x @ own.enc_rows.T + own.bias
        fired = torch.zeros(pre.shape, dtype=torch.bool)
        fired[found.token, found.row] = True
        near = (pre - own.threshold).abs() < CLOSE * own.threshold
        if wrong := int(((fired != (pre > own.threshold)) & ~near).sum()):
            return f"{wrong} hits are not those of the reference"
        errors = {
            "value": (found.value - pre[found.token, found.row]).abs() / own.threshold[found.row],
            "probe": (found.probe - truth.probe).abs() / truth.probe.abs().max(),
            "pooled": torch.from_numpy(pooled) - ((pre / own.threshold * 2 - 2).clamp(0, 1)).double().sum(0),
        }
        for part, error in errors.items():
            allowed = ERROR[name] * (len(x) if part == "pooled" else 1)
            if error.numel() and float(error.abs().max()) > allowed:
                return f"{part}: largest error {float(error.abs().max()):.2g}, expected {allowed:.2g}"
    return ""
