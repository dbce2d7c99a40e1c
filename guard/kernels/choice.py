"""Which encoder runs. The caller names one or asks for `auto`; nothing falls back silently."""

from guard.errors import ConfigError
from guard.kernels.contract import Encoder
from guard.kernels.cpu import CpuEncoder
from guard.kernels.reference import ReferenceEncoder

_ENCODERS: dict[str, type[CpuEncoder] | type[ReferenceEncoder]] = {
    "reference": ReferenceEncoder,
    "cpu": CpuEncoder,
}


def choose(name: str) -> Encoder:
    """Raises ConfigError for a name that is not one of `auto`, `cpu`, `reference`."""
    if name == "auto":
        return CpuEncoder()
    if name not in _ENCODERS:
        raise ConfigError(f"encode.backend: found {name!r}, expected one of auto, {', '.join(sorted(_ENCODERS))}")
    return _ENCODERS[name]()
