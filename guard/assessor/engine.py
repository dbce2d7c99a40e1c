"""A reader and the encoder that fits it, both with torch or both without."""

from dataclasses import dataclass
from pathlib import Path

from guard.config import GuardConfig
from guard.errors import ConfigError
from guard.kernels.contract import Encoder, EncodeRows
from guard.pack.loader import Pack
from guard.reader.contract import Reader
from guard.reader.exported import is_exported


@dataclass(frozen=True, slots=True)
class Engine:
    reader: Reader
    dtype: str  # that the reader multiplies in
    encode: Encoder
    rows: list[EncodeRows]  # one a hook point, as `encode` takes them


def start(config: GuardConfig, folder: Path, pack: Pack) -> Engine:
    """The engine for the model in `folder`: a folder that `guard export` made runs without torch.

    Raises ConfigError for settings that do not fit the folder, and WeightsError for a folder that cannot be read.
    """
    return _exported(config, folder, pack) if is_exported(folder) else _torch(config, folder, pack)


def _exported(config: GuardConfig, folder: Path, pack: Pack) -> Engine:
    from guard.kernels.arrays import NumpyEncoder
    from guard.reader.onnx import OnnxReader

    if config.encode.backend not in {"auto", NumpyEncoder.name}:
        raise ConfigError(
            f"encode.backend: found {config.encode.backend!r}, expected auto or numpy: {folder} is an exported reader, "
            f"which runs without torch"
        )
    reader = OnnxReader(folder, [p.name for p in pack.hook_points], threads=config.reader.threads)
    if config.reader.dtype == "bfloat16":
        raise ConfigError(
            f"reader.dtype: found 'bfloat16', expected it unset: {folder} is an exported reader of {reader.dtype}"
        )
    return Engine(reader, reader.dtype, NumpyEncoder(), [EncodeRows.of(p) for p in pack.hook_points])


def _torch(config: GuardConfig, folder: Path, pack: Pack) -> Engine:
    try:
        import torch
    except ImportError:
        raise ConfigError(
            f"reader.model {folder}: reading it needs torch: pip install 'sae-guard[torch]'; a folder that "
            f"guard export made needs only 'sae-guard[onnx]'"
        ) from None
    from guard.kernels import choice
    from guard.reader.model import TorchReader, pick_dtype

    if config.reader.threads:
        torch.set_num_threads(config.reader.threads)
    dtype = pick_dtype(config.reader.dtype)
    return Engine(
        reader=TorchReader(folder, [p.name for p in pack.hook_points], dtype=dtype),
        dtype=str(dtype).removeprefix("torch."),
        encode=choice.choose(config.encode.backend),
        rows=[EncodeRows.of(p, torch.from_numpy) for p in pack.hook_points],
    )
