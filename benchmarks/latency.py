"""One 128-token prompt: where its time goes, and how far the reader is from this machine's matrix products."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.figures import Report, interleaved
from benchmarks.given import assessing, furthest, on_worker, text_of
from guard.assessor import Assessor
from guard.reader.model import LaidOut, TorchReader
from guard.records import CheckInput, Verdict

TOKENS = 128
STAGES = ("tokenize", "queue", "read", "encode", "score")
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}  # of any score, against float32 with the reference encoder


def run(report: Report, pack: Path, repeats: int) -> None:
    with assessing(pack, *TOLERANCE) as (assessor, use):
        given = CheckInput(text_of(assessor.pipeline.tokenizer, TOKENS))
        expected = _with_reference_encoder(assessor, given)
        stages: dict[str, list[dict[str, float]]] = {}
        cases: dict[str, Callable[[], object]] = {}
        for dtype, choose in use.items():
            choose()
            difference = furthest(assessor.check(given), expected)
            report.notes[f"{dtype}: largest difference of a score"] = difference
            if difference > TOLERANCE[dtype]:
                report.refuse(f"check, {dtype}", f"scores differ by {difference:.2g}, expected {TOLERANCE[dtype]:g}")
                continue
            stages[dtype] = []
            cases[f"check, {dtype}"] = partial(_check, assessor, choose, given, stages[dtype])
            multiply = products(assessor.pipeline.reader, TOKENS + 1)
            cases[f"products alone, {dtype}"] = partial(on_worker, assessor, multiply)
        if "float32" not in stages:
            return  # the baseline
        seconds = interleaved(cases, repeats, warm=True)
        _figures(report, assessor, seconds, {dtype: told[3::2] for dtype, told in stages.items()})  # the timed ones


def _check(assessor: Assessor, choose: Callable[[], None], given: CheckInput, stages: list[dict[str, float]]) -> None:
    choose()
    stages.append(assessor.check(given).timings)


def _figures(
    report: Report, assessor: Assessor, seconds: dict[str, list[float]], stages: dict[str, list[dict[str, float]]]
) -> None:
    flops = reader_flops(assessor.pipeline.reader, TOKENS + 1)
    report.notes |= {f"GFLOP of the reader's {part}": count / 1e9 for part, count in flops.items()}
    report.notes["GFLOP of the pack's rows"] = rows_flops(assessor, TOKENS) / 1e9
    whole = ("check, float32", seconds["check, float32"])
    for name, told in stages.items():
        report.add(f"check, {name}", seconds[f"check, {name}"], whole)
        for stage in STAGES:
            own = (f"check, {name}", seconds[f"check, {name}"])
            report.add(f"  {stage}, {name}", [t[stage] for t in told], own, "share of the whole")
        bare = seconds[f"products alone, {name}"]
        read = [t["read"] for t in told]
        report.add(f"  read, {name}", read, (f"products alone, {name}", bare), "distance from the limit: 1 is at it")
        rates = [flops["matrix products"] / s / 1e9 for s in bare]
        report.notes[f"GFLOP/s of the products alone, {name}"] = sorted(rates)[len(rates) // 2]
        total = sum(flops.values())
        report.notes[f"GFLOP/s of the reader, {name}"] = total / sorted(read)[len(read) // 2] / 1e9


def products(reader: TorchReader, tokens: int) -> Callable[[], object]:
    """The reader's own weights times inputs of its own shapes, and nothing between them."""
    own = reader._body.layers.modules()  # noqa: SLF001 - its own shapes
    layers = [module for module in own if isinstance(module, LaidOut | torch.nn.Linear)]
    inputs: dict[int, torch.Tensor] = {}

    @torch.inference_mode()
    def multiply() -> None:
        for layer in layers:
            if layer.in_features not in inputs:  # made on the thread that multiplies, see given.Shared
                inputs[layer.in_features] = torch.randn(1, tokens, layer.in_features).to(reader.dtype)
            layer(inputs[layer.in_features])

    return multiply


def reader_flops(reader: TorchReader, tokens: int) -> dict[str, float]:
    """Multiply-adds times two. Attention: scores and sums over the pairs that a causal model must look at."""
    pairs = tokens * (tokens + 1) / 2
    return {
        "matrix products": float(reader.flops_per_token() * tokens),
        "attention": 4 * pairs * reader.d_model * reader.depth,
    }


def rows_flops(assessor: Assessor, tokens: int) -> float:
    points = assessor.pack.hook_points
    return float(sum(2 * tokens * p.enc_rows.shape[1] * (len(p.enc_rows) + len(p.probe_rows)) for p in points))


def _with_reference_encoder(assessor: Assessor, given: CheckInput) -> Verdict:
    from guard.kernels.reference import ReferenceEncoder

    chosen, assessor.pipeline.encode = assessor.pipeline.encode, ReferenceEncoder()
    try:
        return assessor.check(given)
    finally:
        assessor.pipeline.encode = chosen
