"""What every encoder takes and gives. The three implementations (reference, CPU, Triton) keep this one contract."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncodeRows:
    """One hook point's rows: `pre = x @ enc_rows.T + bias`; a latent fires where `pre > threshold`.

    Probe rows read the token's direction alone: `probe = (x / rms(x)) @ probe_rows.T + probe_bias`. A few tokens of
    most models carry a norm a hundred times that of the others, and would rule any mean over tokens.
    """

    enc_rows: Tensor  # [K, d_model] float32
    bias: Tensor  # [K]
    threshold: Tensor  # [K]
    probe_rows: Tensor  # [P, d_model]
    probe_bias: Tensor  # [P]


@dataclass(frozen=True)
class Encoded:
    """What fired, in order of token and then row, and the probes of every token."""

    token: Tensor  # [N] int64
    row: Tensor  # [N] int64
    value: Tensor  # [N] float32, the pre-activation
    probe: Tensor  # [T, P] float32
    finite: bool  # False where x is not `representable`: then nothing else here may be used


class Encoder(Protocol):
    """`x [T, d_model]` of any float dtype; products are taken in float32. Raises ValueError for another d_model."""

    name: str

    def __call__(self, x: Tensor, rows: EncodeRows) -> Encoded: ...


def representable(x: Tensor) -> bool:
    """Whether `x [T, d_model]` is free of NaN, of infinity, and of values whose square or product would overflow.

    A token whose sum of squares is finite has a length below 2e19, so no product with a row of a length up to 1e19
    overflows, nor any partial sum of it: the pre-activations need no check of their own.
    """
    return bool(x.square().sum(dim=1).isfinite().all())


def inverse_rms(x: Tensor) -> Tensor:
    """`[T, 1]`, one over the root mean square of each token's activations; 0 for a token that is all zeros."""
    square = x.square().mean(dim=1, keepdim=True)
    return torch.where(square > 0, square.clamp(min=1e-12).rsqrt(), 0.0)


def rms_normalised(x: Tensor) -> Tensor:
    """`[T, d_model]`, each token divided by its root mean square."""
    return x * inverse_rms(x)


def check_shape(x: Tensor, rows: EncodeRows) -> None:
    d_model = rows.enc_rows.shape[1]
    if x.dim() != 2 or x.shape[1] != d_model:
        raise ValueError(f"activations: found shape {list(x.shape)}, expected [T, {d_model}]")


def not_finite(x: Tensor, rows: EncodeRows) -> Encoded:
    empty = torch.empty(0, dtype=torch.long)
    return Encoded(empty, empty, torch.empty(0), torch.full((len(x), len(rows.probe_rows)), torch.nan), finite=False)
