"""Which encoder runs. The caller names one or asks for `auto`; nothing falls back silently."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch

from guard.errors import ConfigError
from guard.kernels.contract import Encoder
from guard.kernels.cpu import CpuEncoder
from guard.kernels.reference import ReferenceEncoder


def _triton(rows: torch.dtype = torch.float32) -> Encoder:
    if find_spec("triton") is None:
        raise ConfigError(
            "encode.backend: found no package 'triton', which it runs on, expected pip install 'sae-guard[cuda]'"
        )
    from guard.kernels.gpu import FusedEncoder  # imports triton, which every other choice does without

    return FusedEncoder(rows)


_ENCODERS: dict[str, Callable[[], Encoder]] = {
    "reference": ReferenceEncoder,
    "cpu": CpuEncoder,
    "cpu-bf16": partial(CpuEncoder, torch.bfloat16),
    "triton": _triton,
    "triton-bf16": partial(_triton, torch.bfloat16),
    "triton-int8": partial(_triton, torch.int8),
    "triton-fp8": partial(_triton, torch.float8_e4m3fn),
}


def choose(name: str) -> Encoder:
    """`auto` is triton where there is a CUDA device, else cpu. The encoder's own `name` says which it was.

    `cpu-bf16`, `triton-bf16`, `triton-int8` and `triton-fp8` round the rows: less to read, and a few hits near their
    thresholds move (`benchmarks/results/rows.json`). Raises ConfigError for another name, and for one that cannot run
    here: on a CUDA device without the package `auto` says so too, rather than encode on the CPU unasked.
    """
    if name == "auto":
        return _triton() if torch.cuda.is_available() else CpuEncoder()
    if name not in _ENCODERS:
        raise ConfigError(f"encode.backend: found {name!r}, expected one of auto, {', '.join(sorted(_ENCODERS))}")
    return _ENCODERS[name]()
