"""What `guard export` writes beside the graph, and how a folder is told to be an exported reader. No torch, no onnx."""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guard.errors import WeightsError

MANIFEST = "guard-export.json"
GRAPH = "reader.onnx"
WEIGHTS = "reader.onnx.data"
TOKENIZER = "tokenizer.json"


class Made(BaseModel):
    """How the folder came to be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    guard: str
    onnx: str
    model: str = Field(description="the model folder's name")
    pack: str = Field(description="id and version of the pack whose hook points these are")
    calibrated_on: int = Field(description="texts of that pack that int8 was calibrated on; 0 for float32")
    smoothing: float = Field(description="SmoothQuant's alpha; 0 for float32")
    products: dict[str, int] = Field(description="matrix products by how they are taken")


class Export(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    fingerprint: dict[Literal["weights", "tokenizer"], str]  # of the model that was exported
    hook_points: tuple[str, ...] = Field(min_length=1)
    dtype: Literal["float32", "int8"]
    d_model: int = Field(gt=0)
    depth: int = Field(gt=0)
    positions: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    flops_per_token: int = Field(gt=0)
    made: Made
    files: dict[str, str]  # name -> SHA-256


def is_exported(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_export(folder: Path) -> Export:
    """Raises WeightsError naming the file, the key and what is wrong with it."""
    file = folder / MANIFEST
    try:
        return Export.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(the whole file)"
        raise WeightsError(f"{file}: {key}: found {str(first['input'])[:80]!r}: {first['msg']}") from None


def check_files(folder: Path, export: Export) -> None:
    """Raises WeightsError for a file that is absent, or is not what was exported."""
    for name, expected in export.files.items():
        file = folder / name
        if not file.is_file():
            raise WeightsError(f"exported folder {folder}: missing {name}")
        if (found := sha256(file)) != expected:
            raise WeightsError(f"{file}: sha256: found {found}, expected {expected} ({MANIFEST})")
    for name in (GRAPH, WEIGHTS, TOKENIZER):
        if name not in export.files:
            raise WeightsError(f"{folder / MANIFEST}: files: found no {name}, expected its SHA-256")


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
