"""The CPU encoders on random rows of real shapes, against products, the eager pipeline, the full width and sae-lens.

Bars: .85 of the bare product's speed in the same dtype, 2 times the eager pipeline's, 40 times the full width's for
Safe-SAIL's shapes. Both of the first are speeds of one text's encode with pooled sums, probes and checks.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.figures import Report, interleaved
from benchmarks.given_cpu import (
    DTYPES,
    SHAPES,
    Case,
    Shape,
    bare,
    disagreement,
    eager,
    full,
    make_case,
    sae_lens,
    served,
)
from guard.errors import ConfigError
from guard.kernels import choice

LENGTHS = (1, 16, 256)
INNER = 256  # tokens encoded in one measurement, so that single tokens are measured too
FASTER = "speed against the baseline's"
BARE, EAGER, FULL = 0.85, 2.0, 40.0


def run(report: Report, _pack: Path, repeats: int) -> None:
    limits(report, repeats)
    for name, shape in SHAPES.items():
        report.notes[name] = f"d_model {shape.d_model}, rows {', '.join(map(str, shape.rows))}"
        for tokens in LENGTHS:
            _figures(report, f"{name}, {tokens} tokens", shape, make_case(shape, tokens), repeats)


def _figures(report: Report, label: str, shape: Shape, case: Case, repeats: int) -> None:
    tokens = len(case.x[0])
    many = max(1, INNER // tokens)
    cases: dict[str, Callable[[], None]] = {}
    names = []
    for name, dtype in DTYPES.items():
        try:
            encoder = choice.choose(name)
        except ConfigError as error:
            report.notes[name] = str(error)
            continue
        if why := disagreement(case, name):
            report.refuse(f"{label}: {name}", why)
            continue
        names.append(name)
        works = {"": served(case, encoder), "bare": bare(case, dtype), "eager": eager(case, dtype)}
        cases |= {f"{name} {kind}".strip(): _times(work, many) for kind, work in works.items()}
    seconds = interleaved(cases, repeats, warm=True)
    if shape.width and tokens == LENGTHS[-1]:
        wide = {"full width": _times(full(case, shape.width), 1), "sae-lens": _times(sae_lens(case, shape.width), 1)}
        again = {name: cases[name] for name in names}  # beside the full width, in the same rounds
        beside = interleaved(again | wide, repeats)
    else:
        wide, beside = {}, {}
    for name in names:
        own = [s / many for s in seconds[name]]
        for kind, bar in (("bare", BARE), ("eager", EAGER)):
            other = [s / many for s in seconds[f"{name} {kind}"]]
            against = f"{kind}, {str(DTYPES[name]).removeprefix('torch.')}"
            # A decode step of a few microseconds has no product to hide the checks behind: no bar on the bare one.
            least = bar if kind == "eager" or tokens == LENGTHS[-1] else None
            report.add(
                f"{label}: {name}", own, (against, other), FASTER, scale=1e6, unit="us", inverse=True, at_least=least
            )
        report.notes[f"{label}: GFLOP/s, {name}"] = case.flops / statistics.median(own) / 1e9
        for kind in wide:
            least = FULL if "Safe-SAIL" in label and kind == "full width" else None
            own = [s / many for s in beside[name]]
            report.add(
                f"{label}: {name}", own, (f"{kind}, float32", beside[kind]), FASTER,
                scale=1e6, unit="us", inverse=True, at_least=least,
            )  # fmt: skip


def _times(work: Callable[[], object], many: int) -> Callable[[], None]:
    @torch.inference_mode()
    def measured() -> None:
        for _ in range(many):
            work()

    return measured


def limits(report: Report, repeats: int) -> None:
    """What this machine's library reaches: products of 2048 x 2048 matrices in either dtype, and a large copy."""
    square, source = torch.randn(2048, 2048), torch.empty(1 << 27, dtype=torch.uint8)
    low, target = square.bfloat16(), torch.empty_like(source)
    with torch.inference_mode():
        seconds = interleaved(
            {"float32": lambda: square @ square, "bfloat16": lambda: low @ low, "copy": lambda: target.copy_(source)},
            repeats,
        )
    for dtype in ("float32", "bfloat16"):
        report.notes[f"measured {dtype} product rate, GFLOP/s"] = 2 * 2048**3 / statistics.median(seconds[dtype]) / 1e9
    report.notes["measured copy rate, read and written, GB/s"] = (
        2 * len(source) / statistics.median(seconds["copy"]) / 1e9
    )
