"""`python -m benchmarks.gpu`: the fused kernel on a CUDA device against the library's product and the eager pipeline.

Outputs are held against the fp32 reference first, and no speed is shown where they disagree. Bars: prefill at 0.9 of
the bare product's speed or more and 3 times the eager pipeline's, decode 5 times the eager pipeline's. Exit status 1
where a figure was refused or a bar missed, 2 where there is no CUDA device.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.figures import Report, table
from benchmarks.given_gpu import SHAPES, Case, disagreement, make_case
from benchmarks.machine import describe

RESULTS = Path(__file__).parent / "results"
PREFILL, DECODE = (1024, 4096), (1, 16, 64, 256)
INNER = 10  # launches in one measurement, so that the clock of the device is fine enough


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="shape", help=f"of {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu.json", metavar="PATH", help="the file to write")
    parser.add_argument("--repeats", type=int, default=20, help="interleaved repeats of each measurement")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in SHAPES]:
        parser.error(f"unknown shape {unknown[0]!r}, expected one of: {', '.join(SHAPES)}")
    if not torch.cuda.is_available():
        sys.stderr.write(f"benchmarks.gpu: found no CUDA device (torch {torch.__version__}), expected one\n")
        return 2
    from guard.kernels import fused

    if fused.INTERPRETED:
        sys.stderr.write(
            "benchmarks.gpu: found TRITON_INTERPRET set, expected it unset: the interpreter has no speed\n"
        )
        return 2

    report, console = Report("gpu"), Console(width=None if sys.stdout.isatty() else 150)
    copied, multiplied = _limits(given.repeats)
    report.notes |= {"measured copy rate, GB/s": copied / 1e9, "measured bf16 product rate, TFLOP/s": multiplied / 1e12}
    for name in given.names or SHAPES:
        for tokens in (*PREFILL, *DECODE):
            with console.status(f"{name}, {tokens} tokens ..."):
                _figures(report, make_case(name, tokens), given.repeats, copied, multiplied)
            torch.cuda.empty_cache()
    console.print(table(report))
    device = torch.cuda.get_device_properties(0)
    told = {"device": device.name, "memory": device.total_memory, "cuda": torch.version.cuda, "machine": describe()}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({**report.as_json(), **told}, indent=2) + "\n")
    return int(report.failed)


def _figures(report: Report, case: Case, repeats: int, copied: float, multiplied: float) -> None:
    name = f"{case.name}, {case.tokens} tokens"
    if why := disagreement(case):
        report.refuse(name, why)
        return
    try:
        replay = _captured(case)
    except RuntimeError as error:  # what CUDA says of a synchronisation under capture
        report.refuse(f"{name}, graph", str(error).splitlines()[0])
        return
    if why := disagreement(case, replay):
        report.refuse(f"{name}, graph", why)
        return
    seconds = _interleaved(
        {
            "fused": case.fused,
            "graph": replay,
            "bare": _graph(case.bare),  # in a graph too: its launches are not what is compared
            "eager": case.eager,  # cannot be captured: nonzero waits for the device
            "full": _graph(case.full),
        },
        repeats,
    )
    decode = case.tokens <= DECODE[-1]
    faster = "speed against the baseline's"
    report.add(f"{name}: bare product", seconds["bare"], ("itself", seconds["bare"]), scale=1e6, unit="us")
    for kind, other, bar in (
        ("graph", "bare", None if decode else 0.9),
        ("graph", "eager", 5.0 if decode else 3.0),
        ("fused", "eager", None),
        ("graph", "full", None),
    ):
        against = (f"{other}, {case.tokens} tokens", seconds[other])
        report.add(f"{name}: {kind}", seconds[kind], against, faster, scale=1e6, unit="us", inverse=True, at_least=bar)
    spent = statistics.median(seconds["graph"])
    report.notes[f"{name}: of the copy rate"] = case.bytes_read / spent / copied
    report.notes[f"{name}: of the product rate"] = case.flops / spent / multiplied


def _captured(case: Case) -> Callable[[], None]:
    """The pooled launch in a graph, after one in which every wait for the device is an error; the first call tunes."""
    case.fused()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.fused()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return _graph(case.fused)  # where what would wait for the device is an error of its own


def _graph(work: Callable[[], object]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries make their workspaces before the capture
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Callable[[], None] = graph.replay
    return replay


def _interleaved(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of one call by the device's own clock; every round starts with another case."""
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-2, repeats):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(INNER):
                cases[name]()
            end.record()
            end.synchronize()
            if number >= 0:
                seconds[name].append(begin.elapsed_time(end) / 1e3 / INNER)
    return seconds


def _limits(repeats: int) -> tuple[float, float]:
    """Bytes a second of a large copy, read and written, and operations a second of a large bf16 product."""
    source = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    square: Tensor = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    seconds = _interleaved({"copy": lambda: target.copy_(source), "product": lambda: square @ square}, repeats)
    return 2 * len(source) / statistics.median(seconds["copy"]), 2 * 8192**3 / statistics.median(seconds["product"])


if __name__ == "__main__":
    sys.exit(main())
