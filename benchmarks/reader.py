"""The readers side by side: torch, eager transformers, exported float32 and int8; and the sidecar without torch.

Each reading is held against what the machine could do: its FLOPs (matrix products and attention) over the rate at which
this machine multiplies bfloat16 matrices of the reader's own shapes, measured in the same rounds.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.figures import Report, interleaved
from benchmarks.given import text_of
from benchmarks.latency import products, reader_flops
from guard.cli.export import source
from guard.pack.loader import Pack, load_pack
from guard.reader import weights
from guard.reader.export import export
from guard.reader.model import TorchReader
from guard.reader.onnx import OnnxReader
from guard.reader.tokens import TextTokenizer

LENGTHS = {128: 1.4, 16: 2.5}  # tokens -> the bar of the best reader, times FLOPs over the bfloat16 rate
INT8_BAR = 1.0  # at 128 tokens
TOLERANCE = {"torch bfloat16": 0.99, "onnx int8": 0.99}  # least mean cosine; 0.9999 for what is float32
STARTS = 3
SECONDS, MEGABYTES = 3.0, 500.0
Read = Callable[[list[int]], dict[str, np.ndarray]]


def run(report: Report, pack: Path, repeats: int) -> None:
    loaded, folder = load_pack(pack), weights.resolve(weights.DEFAULT_MODEL)
    points = [p.name for p in loaded.hook_points]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {dtype: Path(scratch) / dtype for dtype in ("float32", "int8")}
        for dtype, target in folders.items():
            export(folder, source(loaded), target, dtype)  # type: ignore[arg-type]
        half = TorchReader(folder, points, dtype=torch.bfloat16)
        readers = {
            "torch float32": _torch(TorchReader(folder, points)),
            "torch bfloat16": _torch(half),
            "onnx float32": _onnx(OnnxReader(folders["float32"], points)),
            "onnx int8": _onnx(OnnxReader(folders["int8"], points)),
            "eager transformers float32": _eager(folder, points),
        }
        tokenizer = TextTokenizer(folder)
        for tokens, bar in LENGTHS.items():
            ids = [tokenizer.sink_id, *tokenizer.text(text_of(tokenizer, tokens)).ids]
            _lengths(report, readers, half, ids, bar, repeats)
        for dtype, target in folders.items():
            _sidecar(report, loaded, target, dtype)


def _lengths(
    report: Report, readers: dict[str, Read], half: TorchReader, ids: list[int], bar: float, repeats: int
) -> None:
    tokens = len(ids) - 1
    truth = readers["torch float32"](ids)
    cases: dict[str, Callable[[], object]] = {}
    for name, read in readers.items():
        least = _least_cosine(read(ids), truth)
        report.notes[f"{name}, {tokens} tokens: least mean cosine of a hook point"] = least
        if least < TOLERANCE.get(name, 0.9999):
            report.refuse(f"{name}, {tokens} tokens", f"cosine {least:.5f}, expected {TOLERANCE.get(name, 0.9999):g}")
            continue
        cases[name] = lambda read=read: read(ids)
    multiply = products(half, len(ids))
    cases["products"] = multiply
    seconds = interleaved(cases, repeats, warm=True)
    flops = reader_flops(half, len(ids))
    share = sum(flops.values()) / flops["matrix products"]
    limit = (f"FLOPs over the bfloat16 rate, {tokens} tokens", [s * share for s in seconds.pop("products")])
    rates = [sum(flops.values()) / s / 1e9 for s in limit[1]]
    report.notes[f"GFLOP/s of bfloat16 products, {tokens} tokens"] = statistics.median(rates)
    best = min(seconds, key=lambda name: statistics.median(seconds[name]))
    for name, spent in seconds.items():
        bars = [bar] if name == best else []
        bars += [INT8_BAR] if name == "onnx int8" and tokens == max(LENGTHS) else []
        report.add(f"{name}, {tokens} tokens", spent, limit, "1 is at the limit", below=min(bars, default=None))


def _torch(reader: TorchReader) -> Read:
    def read(ids: list[int]) -> dict[str, np.ndarray]:
        return {point: seen.float().numpy() for point, seen in reader.read([ids])[0].items()}

    return read


def _onnx(reader: OnnxReader) -> Read:
    return lambda ids: dict(reader.read([ids])[0])


def _eager(folder: Path, points: list[str]) -> Read:
    """What one writes without Guard: the whole model, and all hidden states."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    layers = [int(point.rpartition(".")[2]) for point in points]

    @torch.inference_mode()
    def read(ids: list[int]) -> dict[str, np.ndarray]:
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        return {point: states[layer + 1][0].numpy() for point, layer in zip(points, layers, strict=True)}

    return read


def _least_cosine(found: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> float:
    def mean(own: np.ndarray, true: np.ndarray) -> float:
        return float(((own * true).sum(1) / np.linalg.norm(own, axis=1) / np.linalg.norm(true, axis=1)).mean())

    return min(mean(found[point], true) for point, true in truth.items())


def _sidecar(report: Report, pack: Pack, folder: Path, dtype: str) -> None:
    """From the start of `guard serve` to readiness, and the memory that it then holds."""
    seconds, megabytes = [], []
    for _ in range(STARTS):
        started = time.perf_counter()
        process = _serve(pack, folder)
        try:
            if not _ready(process):
                report.refuse(f"sidecar, onnx {dtype}", f"ended with status {process.wait()} before it served")
                return
            seconds.append(time.perf_counter() - started)
            megabytes.append(_resident(process.pid))
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()
    report.add(f"start to readiness, onnx {dtype}", seconds, ("the bar", [SECONDS] * STARTS), below=1.0)
    memory = (f"{MEGABYTES:g} MB", [MEGABYTES] * STARTS)
    report.add(f"resident memory, onnx {dtype}", megabytes, memory, "share", scale=1, unit="MB", below=1.0)


def _serve(pack: Pack, folder: Path) -> "subprocess.Popen[str]":
    arguments = ["--pack", str(pack.folder), "--set", f"reader.model={folder}", "--listen", "127.0.0.1:0"]
    return subprocess.Popen(
        [sys.executable, "-m", "guard.cli.main", "serve", *arguments, "--metrics", ""],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def _ready(process: "subprocess.Popen[str]") -> bool:
    return process.stdout is not None and any(line.startswith("serving") for line in process.stdout)


def _resident(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1e3
