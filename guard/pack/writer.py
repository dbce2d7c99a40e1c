"""Writes a pack: the same input gives the same bytes, and the folder gets all of them or stays as it was."""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel

from guard.errors import PackError
from guard.pack.loader import CASES, EVALUATION, LATENTS, README, ROWS, HookPointRows, load_pack, sealed
from guard.pack.manifest import FILES, MANIFEST, CaseLine, LatentLine, Manifest

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def write_pack(
    folder: Path,
    manifest_without_files: Manifest,
    rows: Sequence[HookPointRows],
    head_weights: NDArray[np.floating[Any]],
    probe_weights: NDArray[np.floating[Any]],
    latents: Sequence[LatentLine],
    cases: Sequence[CaseLine],
    evaluation: dict[str, Any],
    readme: str,
) -> str:
    """Writes the pack, loads it once as a check, then moves it into place. Returns its hash.

    `manifest_without_files` has `files={}`; `rows` stand in its order of hook points; `head_weights [H, K_total]` and
    `probe_weights [H, P_total]` as in Pack. A pack that `folder` holds is replaced. Raises PackError, and leaves
    `folder` as it was, for anything that load_pack refuses, and for a folder that holds something else than a pack.
    """
    check_replaceable(folder)
    names, expected = [point.name for point in rows], [point.name for point in manifest_without_files.hook_points]
    if names != expected:
        raise PackError.at(folder / ROWS, "hook points", ", ".join(names), ", ".join(expected))
    contents = {
        ROWS: _tensors(rows, head_weights, probe_weights, folder / ROWS),
        LATENTS: _lines(latents, folder / LATENTS),
        CASES: _lines(cases, folder / CASES),
        EVALUATION: _json(evaluation, folder / EVALUATION, indent=2),
        README: readme.encode(),
    }
    hashes = {name: hashlib.sha256(contents[name]).hexdigest() for name in FILES}
    manifest = manifest_without_files.model_copy(update={"files": hashes})
    contents[MANIFEST] = sealed(manifest_toml(manifest).encode())

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        scratch = Path(name)
        new = scratch / "new"
        new.mkdir()
        for file, data in contents.items():
            (new / file).write_bytes(data)
        try:
            pack = load_pack(new)
        except PackError as error:
            # The scratch folder is gone when somebody reads this.
            metadata = {key: value.replace(str(new), str(folder)) for key, value in error.metadata.items()}
            raise PackError(str(error).replace(str(new), str(folder)), **metadata) from None
        _replace(folder, new, scratch / "old")
    return pack.hash


def check_replaceable(folder: Path) -> None:
    """Raises PackError for a folder that holds something else than a pack."""
    if folder.exists() and not (folder / MANIFEST).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PackError.at(folder, "folder", f"something without {MANIFEST}", "a pack to replace, or an empty folder")


def manifest_toml(manifest: Manifest) -> str:
    """The manifest as TOML that read_manifest reads back equal; a key without a value is left out."""
    values, tables = [], []
    for key, value in manifest.model_dump().items():
        if isinstance(value, dict):
            tables.append(f"\n[{key}]\n" + _pairs(value))
        elif isinstance(value, tuple) and value:
            tables.extend(f"\n[[{key}]]\n" + _pairs(item) for item in value)
        else:
            values.append((key, value))
    return _pairs(dict(values)) + "".join(tables)


def _pairs(values: dict[str, Any]) -> str:
    return "".join(f"{_key(key)} = {_value(value)}\n" for key, value in values.items() if value is not None)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _value(value: object) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)  # the shortest text that reads back equal
    return "[]" if value == () else str(value)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, but TOML wants DEL escaped too.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _tensors(
    rows: Sequence[HookPointRows],
    head_weights: NDArray[np.floating[Any]],
    probe_weights: NDArray[np.floating[Any]],
    file: Path,
) -> bytes:
    tensors: dict[str, NDArray[Any]] = {"head_weights": head_weights, "probe_weights": probe_weights}
    for point in rows:
        if not np.issubdtype(point.latents.dtype, np.integer):
            raise PackError.at(file, f"{point.name}.latents", point.latents.dtype, "integers")
        for name, values in vars(point).items():
            if name != "name":
                tensors[f"{point.name}.{name}"] = values
    return safetensors.numpy.save(
        {
            name: np.ascontiguousarray(values, dtype=np.int64 if name.endswith(".latents") else np.float32)
            for name, values in sorted(tensors.items())
        }
    )


def _lines(lines: Iterable[BaseModel], file: Path) -> bytes:
    return b"".join(_json(line.model_dump(), f"{file}:{number}") for number, line in enumerate(lines, start=1))


def _json(values: dict[str, Any], where: object, indent: int | None = None) -> bytes:
    try:
        return (json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise PackError.at(where, "JSON", f"an error ({error})", "values that JSON holds") from None


def _replace(folder: Path, new: Path, old: Path) -> None:
    """`old`, on the same disk, keeps what `folder` held until `new` is in its place."""
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
