"""A pack's folder, read and checked whole before anything uses it: TOML, JSON and safetensors only. No torch, no grpc.

Order of the checks: the manifest, the hash of every file, the header of the tensors, their values, the JSON lines. The
bytes that are parsed are the bytes that were hashed.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from guard.errors import PackError
from guard.pack.manifest import FILES, MANIFEST, CaseLine, HeadSection, LatentLine, Manifest, T, parse, read_manifest
from guard.records import ModelInfo, PackInfo

ROWS, LATENTS, CASES, EVALUATION, README = FILES
ROWS_LIMIT = 2 << 30  # bytes of all tensors
TEXT_LIMIT = 256 << 20  # bytes of any other file
MANIFEST_LIMIT = 1 << 20
HEADER_LIMIT = 1 << 20
_DTYPES = {"F32": 4, "I64": 8}  # bytes of one value
_HOOK_POINT = re.compile(r"\w+(\.\w+)*", re.ASCII)
_DOMAIN = re.compile(r"[a-z][a-z0-9_]*")
_SEAL = b"# sha256 of all lines above: "

Float32s = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class HookPointRows:
    """What is encoded at one hook point. Latent i fires on x where `x @ enc_rows[i] + bias[i] > threshold[i]`.

    Decoder bias and input scaling are folded into `bias` (and likewise into `probe_bias`).
    """

    name: str
    latents: NDArray[np.int64]  # [K] index in the full SAE
    enc_rows: Float32s  # [K, d_model]
    bias: Float32s  # [K]
    threshold: Float32s  # [K]
    scale: Float32s  # [K], above the threshold: what counts as a strong activation of this latent
    probe_rows: Float32s  # [P, d_model]
    probe_bias: Float32s  # [P]


@dataclass(frozen=True, eq=False)
class Pack:
    """A pack that passed every check. Columns of weights stand in the order of the rows, hook point by hook point."""

    folder: Path
    manifest: Manifest
    hash: str  # SHA-256 of the manifest, which holds the SHA-256 of every other file
    hook_points: tuple[HookPointRows, ...]  # in the manifest's order
    latents: tuple[LatentLine, ...]  # K_total, in the order of the rows
    head_weights: Float32s  # [H, K_total], H in the order of manifest.heads
    probe_weights: Float32s  # [H, P_total]
    cases: tuple[CaseLine, ...]
    evaluation: dict[str, Any]

    @property
    def info(self) -> PackInfo:
        return PackInfo(self.manifest.id, self.manifest.version, self.hash)

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """In the order in which the heads name them."""
        return tuple(dict.fromkeys(head.domain for head in self.manifest.heads))


def load_pack(folder: Path) -> Pack:
    """Reads and checks a pack. Raises PackError naming the file, the key, what was found and what was expected."""
    manifest, digest = _read_manifest(folder / MANIFEST)
    _check_sections(manifest, folder / MANIFEST)
    _check_listing(manifest, folder)
    shapes = _expected_tensors(manifest)
    size = sum(_size(*expected) for expected in shapes.values())
    if size > ROWS_LIMIT:
        raise PackError.at(folder / MANIFEST, "hook_points", f"{size} bytes of tensors", f"at most {ROWS_LIMIT}")
    limits = {ROWS: 8 + HEADER_LIMIT + size}
    files = {
        name: _read_hashed(folder / name, sha256, limits.get(name, TEXT_LIMIT))
        for name, sha256 in manifest.files.items()
    }
    _check_header(files[ROWS], shapes, folder / ROWS)
    tensors = _read_tensors(files.pop(ROWS), folder / ROWS)
    hook_points = tuple(_rows(point.name, tensors) for point in manifest.hook_points)
    pack = Pack(
        folder=folder,
        manifest=manifest,
        hash=digest,
        hook_points=hook_points,
        latents=_read_lines(LatentLine, files[LATENTS], folder / LATENTS),
        head_weights=tensors["head_weights"],
        probe_weights=tensors["probe_weights"],
        cases=_read_lines(CaseLine, files[CASES], folder / CASES),
        evaluation=_read_json(_text(files[EVALUATION], folder / EVALUATION), folder / EVALUATION),
    )
    _check_finite(pack, folder / ROWS)
    _check_rows(pack, manifest, folder / ROWS)
    _check_latents(pack, folder / LATENTS)
    _check_cases(pack, folder / CASES)
    return pack


def check_model(pack: Pack, fingerprint: dict[str, str], allow_unverified: bool) -> ModelInfo:  # noqa: FBT001 - the setting's own name
    """Whether the pack was made for this model (`fingerprint` as of guard.reader.weights.fingerprint).

    Raises PackError for another model, unless `allow_unverified`: then the answer says that it is not verified.
    """
    model = pack.manifest.model
    for key, expected in (("weights", model.weights), ("tokenizer", model.tokenizer)):
        found = fingerprint[key]
        if found != expected and not allow_unverified:
            raise PackError.at(
                pack.folder / MANIFEST,
                f"model.{key}",
                f"{key} {found[:12]}",
                f"{expected[:12]} ({model.name}); set reader.allow_unverified = true to run unverified",
            )
    verified = fingerprint["weights"] == model.weights and fingerprint["tokenizer"] == model.tokenizer
    return ModelInfo(fingerprint=fingerprint["weights"], verified=verified)


def sealed(body: bytes) -> bytes:
    """`body` and a last line with its SHA-256: the manifest hashes every other file, and this line the manifest."""
    return body + _SEAL + hashlib.sha256(body).hexdigest().encode() + b"\n"


def _read_manifest(file: Path) -> tuple[Manifest, str]:
    try:
        data = _read(file, MANIFEST_LIMIT) if file.exists() else None
        if data is None:
            raise PackError(f"{file}: found no such file, expected a pack's {MANIFEST}")
        manifest = read_manifest(data, file)
    except (OSError, ValueError, RecursionError) as error:  # tomllib lets some errors of int and date through
        raise PackError(f"{file}: {error}") from None
    body, _, seal = data.rpartition(_SEAL)
    if sealed(body) != data:
        found = seal.decode(errors="replace").strip()[:64] if body else "no such line"
        expected = f"{hashlib.sha256(body or data).hexdigest()}; the manifest was changed after the pack was built"
        raise PackError.at(file, "sha256 of all lines above", found, expected)
    return manifest, hashlib.sha256(data).hexdigest()


def _check_sections(manifest: Manifest, file: Path) -> None:
    for section in ("hook_points", "heads"):
        items = getattr(manifest, section)
        names = [item.name for item in items]
        if not names:
            raise PackError.at(file, section, "none", "at least one")
        for number, item in enumerate(items):
            for key, value in item.model_dump().items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise PackError.at(file, f"{section}.{number}.{key}", value, "a finite number")
            if item.name in names[:number]:
                raise PackError.at(file, f"{section}.{number}", f"{item.name} again", "each name once")
    for number, point in enumerate(manifest.hook_points):
        if not _HOOK_POINT.fullmatch(point.name):
            raise PackError.at(file, f"hook_points.{number}.name", repr(point.name), "a module's dotted path")
    for number, head in enumerate(manifest.heads):
        _check_head(head, f"heads.{number}", file)


def _check_head(head: HeadSection, key: str, file: Path) -> None:
    if not _DOMAIN.fullmatch(head.domain):
        raise PackError.at(file, f"{key}.domain", repr(head.domain), "a lower-case identifier (a to z, 0 to 9, _)")
    for name in ("flag_at", "block_at"):
        threshold = getattr(head, name)
        if threshold is not None and not 0 <= threshold <= 1:
            raise PackError.at(file, f"{key}.{name}", threshold, "a score between 0 and 1")
    if head.flag_at is not None and head.block_at is not None and head.flag_at > head.block_at:
        raise PackError.at(file, f"{key}.flag_at", head.flag_at, f"at most block_at ({head.block_at})")


def _check_listing(manifest: Manifest, folder: Path) -> None:
    """What the manifest lists and what the folder holds are the same plain files."""
    file = folder / MANIFEST
    for name in manifest.files:
        if re.search(r"[/\\\0]", name) or name in {"", ".", "..", MANIFEST}:
            raise PackError.at(file, "files", repr(name), "another file's name, without a path")
    for name in FILES:
        if name not in manifest.files:
            raise PackError.at(file, "files", f"no entry for {name}", f"one for each of {', '.join(FILES)}")
    for name in manifest.files:
        if not (folder / name).is_file():
            raise PackError.at(folder / name, "file", "nothing", f"a file, as {MANIFEST} lists it")
    for path in sorted(folder.iterdir()):
        if path.name not in manifest.files and path.name != MANIFEST:
            raise PackError.at(path, "file", f"a file that {MANIFEST} does not list", "listed files only")


def _read(file: Path, limit: int) -> bytes:
    try:
        with file.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise PackError.at(file, "file", error.strerror, "a readable file") from None
    if len(data) > limit:
        raise PackError.at(file, "size", f"more than {limit} bytes", f"at most {limit}")
    return data


def _read_hashed(file: Path, sha256: str, limit: int) -> bytes:
    data = _read(file, limit)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise PackError.at(file, "sha256", found, sha256)
    return data


def _expected_tensors(manifest: Manifest) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor of rows.safetensors."""
    expected: dict[str, tuple[str, list[int]]] = {}
    width, heads = manifest.model.d_model, len(manifest.heads)
    for point in manifest.hook_points:
        expected[f"{point.name}.latents"] = ("I64", [point.latents])
        expected[f"{point.name}.enc_rows"] = ("F32", [point.latents, width])
        for name in ("bias", "threshold", "scale"):
            expected[f"{point.name}.{name}"] = ("F32", [point.latents])
        expected[f"{point.name}.probe_rows"] = ("F32", [point.probes, width])
        expected[f"{point.name}.probe_bias"] = ("F32", [point.probes])
    expected["head_weights"] = ("F32", [heads, sum(point.latents for point in manifest.hook_points)])
    expected["probe_weights"] = ("F32", [heads, sum(point.probes for point in manifest.hook_points)])
    return expected


def _size(dtype: str, shape: list[int]) -> int:
    return _DTYPES[dtype] * math.prod(shape)


def _check_header(data: bytes, expected: dict[str, tuple[str, list[int]]], file: Path) -> None:
    """Names, dtypes, shapes and sizes, from the header alone: nothing is allocated for an unexpected tensor."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, HEADER_LIMIT):
        raise PackError.at(file, "header", f"{length} bytes in a file of {len(data)}", "a whole safetensors header")
    header = _read_json(_text(data[8 : 8 + length], file), file)
    header.pop("__metadata__", None)
    for name in header:
        if name not in expected:
            raise PackError.at(file, str(name), "an unknown tensor", f"one of {', '.join(expected)}")
    for name, (dtype, shape) in expected.items():
        if name not in header:
            raise PackError.at(file, name, "no such tensor", f"{dtype} {shape}")
        found = header[name] if isinstance(header[name], dict) else {}
        if found.get("dtype") != dtype or found.get("shape") != shape:
            raise PackError.at(file, name, f"{found.get('dtype')} {found.get('shape')}", f"{dtype} {shape}")
    size = sum(_size(*tensor) for tensor in expected.values())
    if len(data) - 8 - length != size:
        raise PackError.at(file, "size", f"{len(data) - 8 - length} bytes of tensors", size)


def _read_tensors(data: bytes, file: Path) -> dict[str, NDArray[Any]]:
    try:
        return safetensors.numpy.load(data)
    except (SafetensorError, ValueError) as error:
        raise PackError.at(file, "header", error, "a valid safetensors file") from None


def _rows(name: str, tensors: dict[str, NDArray[Any]]) -> HookPointRows:
    fields = ("latents", "enc_rows", "bias", "threshold", "scale", "probe_rows", "probe_bias")
    return HookPointRows(name, **{field: tensors[f"{name}.{field}"] for field in fields})


def _check_rows(pack: Pack, manifest: Manifest, file: Path) -> None:
    for point, rows in zip(manifest.hook_points, pack.hook_points, strict=True):
        seen: set[int] = set()
        for row, latent in enumerate(rows.latents.tolist()):
            if not 0 <= latent < point.sae_width:
                raise PackError.at(
                    file, f"{rows.name}.latents", f"{latent} in row {row}", f"0 to {point.sae_width - 1}"
                )
            if latent in seen:
                raise PackError.at(file, f"{rows.name}.latents", f"{latent} again in row {row}", "each latent once")
            seen.add(latent)
        for row in np.flatnonzero(rows.scale <= np.maximum(rows.threshold, 0))[:1]:
            found = f"{rows.scale[row]} in row {row} (latent {rows.latents[row]})"
            raise PackError.at(file, f"{rows.name}.scale", found, f"a number above its threshold {rows.threshold[row]}")


def _check_finite(pack: Pack, file: Path) -> None:
    for rows in pack.hook_points:
        for name in ("enc_rows", "bias", "threshold", "scale"):
            for row, *_ in np.argwhere(~np.isfinite(getattr(rows, name)))[:1]:
                found = f"NaN or infinity in row {row} (latent {rows.latents[row]})"
                raise PackError.at(file, f"{rows.name}.{name}", found, "finite numbers")
        for name in ("probe_rows", "probe_bias"):
            for row, *_ in np.argwhere(~np.isfinite(getattr(rows, name)))[:1]:
                raise PackError.at(file, f"{rows.name}.{name}", f"NaN or infinity in row {row}", "finite numbers")
    latents = [f"latent {rows.name}/{latent}" for rows in pack.hook_points for latent in rows.latents.tolist()]
    probes = [f"probe {rows.name}/{row}" for rows in pack.hook_points for row in range(len(rows.probe_rows))]
    for name, columns in (("head_weights", latents), ("probe_weights", probes)):
        for head, column in np.argwhere(~np.isfinite(getattr(pack, name)))[:1]:
            found = f"NaN or infinity in row {head} ({pack.manifest.heads[head].name}, {columns[column]})"
            raise PackError.at(file, name, found, "finite numbers")


def _check_latents(pack: Pack, file: Path) -> None:
    rows = [(rows.name, latent) for rows in pack.hook_points for latent in rows.latents.tolist()]
    if len(pack.latents) != len(rows):
        raise PackError.at(file, "lines", len(pack.latents), f"{len(rows)}, one for each row of {ROWS}")
    for number, (line, (name, latent)) in enumerate(zip(pack.latents, rows, strict=True), start=1):
        if (line.hook_point, line.latent) != (name, latent):
            expected = f"{name}/{latent}, as in {ROWS}"
            raise PackError.at(f"{file}:{number}", "latent", f"{line.hook_point}/{line.latent}", expected)


def _check_cases(pack: Pack, file: Path) -> None:
    seen: set[str] = set()
    for number, case in enumerate(pack.cases, start=1):
        if case.domain not in pack.domains:
            expected = f"one of {', '.join(pack.domains)}"
            raise PackError.at(f"{file}:{number}", "domain", repr(case.domain), expected)
        if case.id in seen:
            raise PackError.at(f"{file}:{number}", "id", f"{case.id!r} again", "each id once")
        seen.add(case.id)


def _text(data: bytes, file: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PackError.at(file, "encoding", f"{error.reason} at byte {error.start}", "UTF-8") from None


def _read_lines(schema: type[T], data: bytes, file: Path) -> tuple[T, ...]:
    # Not splitlines: a JSON string may hold U+2028 and its like.
    lines = _text(data, file).removesuffix("\n").split("\n") if data else []
    places = [f"{file}:{number}" for number in range(1, len(lines) + 1)]
    return tuple(parse(schema, _read_json(line, place), place) for line, place in zip(lines, places, strict=True))


def _read_json(text: str, where: object) -> dict[str, Any]:
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise PackError.at(where, "JSON", f"an error ({error})", "one JSON object") from None
    try:  # what json.loads lets through
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise PackError.at(where, "JSON", "a lone surrogate", "Unicode text") from None
    except ValueError:
        raise PackError.at(where, "JSON", "NaN, infinity or a number too large", "finite numbers") from None
    if not isinstance(values, dict):
        raise PackError.at(where, "JSON", type(values).__name__, "one JSON object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return values
