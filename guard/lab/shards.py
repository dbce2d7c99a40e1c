"""Activations on disk: numbered safetensors shards, each written whole or not at all.

A shard holds `[n_tokens, d_model]` bfloat16 for each hook point, `token [n_tokens]`, the ids that were read, and
`piece [n_tokens]`, the text that each came from. A stage that was killed starts again at the first shard that is
absent.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from guard.errors import InvalidInput


class ShardSet(BaseModel):
    """`harvest.json`: what the shards of a folder were made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    fingerprint: dict[str, str]
    hook_points: tuple[str, ...]
    d_model: int
    dtype: str
    context: int
    seed: int
    tokens: int
    sources: tuple[str, ...]
    shard_count: int
    shard_tokens: int = 0  # of older harvests neither is known
    planned: str = ""  # SHA-256 of what is read, token by token


def path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def write(folder: Path, index: int, tensors: dict[str, Tensor]) -> None:
    """Raises InvalidInput for activations that are not finite: an SAE would learn nothing from then on."""
    for name, x in tensors.items():
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise InvalidInput(f"{path(folder, index)}: {name}: found activations that are not finite")
    scratch = folder / f".shard-{index:05d}.tmp"
    save_file(tensors, scratch)
    scratch.replace(path(folder, index))


def describe(folder: Path, shards: ShardSet) -> None:
    """Writes `harvest.json`; refuses a folder that holds shards of something else."""
    file = folder / "harvest.json"
    folder.mkdir(parents=True, exist_ok=True)
    if file.exists():
        known = described(folder)
        unknown = {name for name, field in ShardSet.model_fields.items() if getattr(known, name) == field.default}
        told = [name for name in ShardSet.model_fields if name not in unknown]
        if changed := [name for name in told if getattr(known, name) != getattr(shards, name)]:
            raise InvalidInput(f"{file}: made with another {', '.join(changed)}; choose another --out to start afresh")
        return
    scratch = folder / ".harvest.tmp"
    scratch.write_text(shards.model_dump_json(indent=1))
    scratch.replace(file)


def described(folder: Path) -> ShardSet:
    file = folder / "harvest.json"
    if not file.exists():
        raise InvalidInput(f"{folder}: holds no harvest.json; make one with `guard lab harvest`")
    try:
        return ShardSet.model_validate(json.loads(file.read_text()))
    except ValueError as error:
        raise InvalidInput(f"{file}: {error}") from None


def load(folder: Path, index: int) -> dict[str, Tensor]:
    with readable(file := _existing(folder, index)):
        return load_file(file)


def load_each(folder: Path, key: str) -> list[Tensor] | None:
    """The named tensor of every shard; None where they hold none of that name."""
    parts = []
    for index in range(described(folder).shard_count):
        with readable(file := _existing(folder, index)), safe_open(file, "pt") as shard:
            if key not in shard.keys():  # noqa: SIM118 - not a mapping, keys() is all it has
                return None
            parts.append(shard.get_tensor(key))
    return parts


def load_many(folder: Path, indices: Sequence[int], keys: Sequence[str]) -> dict[str, Tensor]:
    """The named tensors of several shards, joined along the tokens."""
    parts = [load(folder, index) for index in indices]
    return {key: torch.cat([part[key] for part in parts]) for key in keys}


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Raises InvalidInput for a shard that is not whole."""
    try:
        yield
    except SafetensorError as error:
        raise InvalidInput(f"{file}: {error}; remove it and run `guard lab harvest` again") from None


def _existing(folder: Path, index: int) -> Path:
    file = path(folder, index)
    if not file.exists():
        raise InvalidInput(f"{file}: absent; the harvest is not complete, run `guard lab harvest` again")
    return file


def normaliser(folder: Path, hook_point: str) -> float:
    """The factor that brings the mean norm to sqrt(d_model), from the first shard."""
    first = load(folder, 0)[hook_point].float()  # [T, d]
    return float(first.shape[1] ** 0.5 / torch.linalg.vector_norm(first, dim=1).mean())
