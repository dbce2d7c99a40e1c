"""What every encoder takes and gives. All implementations (reference, CPU, Triton, numpy) keep this one contract.

No torch at run time: where the reader is an exported one there may be none. Arrays are those of the encoder's library,
torch tensors for all encoders but the numpy one; `np.asarray` reads what any of them gives.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Array = Any  # torch.Tensor or numpy.ndarray, as the encoder takes them


@dataclass(frozen=True)
class EncodeRows:
    """One hook point's rows: `pre = x @ enc_rows.T + bias`; a latent fires where `pre > threshold`.

    Probe rows read the token's direction alone: `probe = (x / rms(x)) @ probe_rows.T + probe_bias`. A few tokens of
    most models carry a norm a hundred times that of the others, and would rule any mean over tokens.
    """

    enc_rows: Array  # [K, d_model] float32
    bias: Array  # [K]
    threshold: Array  # [K]
    probe_rows: Array  # [P, d_model]
    probe_bias: Array  # [P]

    @classmethod
    def of(cls, rows: object, wrap: Callable[[Any], Array] = lambda array: array) -> Self:
        """A pack's rows, whose arrays are named alike; `wrap` is torch.from_numpy for encoders that take tensors."""
        return cls(**{field.name: wrap(getattr(rows, field.name)) for field in fields(cls)})


@dataclass(frozen=True)
class Encoded:
    """What fired, in order of token and then row, and the probes of every token. All of it on the CPU."""

    token: Array  # [N] int64
    row: Array  # [N] int64
    value: Array  # [N] float32, the pre-activation
    probe: Array  # [T, P] float32
    finite: bool  # False where x is not `representable`: then nothing else here may be used


class Encoder(Protocol):
    """`x [T, d_model]` of any float dtype; products are taken in float32. Raises ValueError for another d_model."""

    name: str

    def __call__(self, x: Array, rows: EncodeRows) -> Encoded: ...


def representable(x: "Tensor") -> bool:
    """Whether `x [T, d_model]` is free of NaN, of infinity, and of values whose square or product would overflow.

    A token whose sum of squares is finite has a length below 2e19, so no product with a row of a length up to 1e19
    overflows, nor any partial sum of it: the pre-activations need no check of their own.
    """
    return bool(x.square().sum(dim=1).isfinite().all())


def inverse_rms(x: "Tensor") -> "Tensor":
    """`[T, 1]`, one over the root mean square of each token's activations; 0 for a token that is all zeros."""
    square = x.square().mean(dim=1, keepdim=True)
    return square.clamp(min=1e-12).rsqrt().where(square > 0, 0.0)


def rms_normalised(x: "Tensor") -> "Tensor":
    """`[T, d_model]`, each token divided by its root mean square."""
    return x * inverse_rms(x)


def check_shape(x: Array, rows: EncodeRows) -> None:
    d_model = rows.enc_rows.shape[1]
    if x.ndim != 2 or x.shape[1] != d_model:
        raise ValueError(f"activations: found shape {list(x.shape)}, expected [T, {d_model}]")


def not_finite(x: Array, rows: EncodeRows) -> Encoded:
    empty = np.empty(0, dtype=np.int64)
    unknown = np.full((len(x), len(rows.probe_rows)), np.nan, dtype=np.float32)
    return Encoded(empty, empty, np.empty(0, dtype=np.float32), unknown, finite=False)
