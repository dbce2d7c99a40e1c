"""16 callers at once against one after the other: what sharing batches is worth on short prompts."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.figures import Report, interleaved
from benchmarks.given import assessing, furthest, text_of
from guard.assessor import Assessor
from guard.records import CheckInput

CALLERS, TOKENS, EACH = 16, 16, 4
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}  # a batch of another shape rounds otherwise
BAR = 2.0


def run(report: Report, pack: Path, repeats: int) -> None:
    with assessing(pack, *TOLERANCE) as (assessor, use):
        for dtype, choose in use.items():
            choose()
            _run(report, assessor, repeats, dtype)


def _run(report: Report, assessor: Assessor, repeats: int, dtype: str) -> None:
    with ThreadPoolExecutor(CALLERS) as callers:
        tokenizer = assessor.pipeline.tokenizer
        given = [CheckInput(text_of(tokenizer, TOKENS, skip=i)) for i in range(CALLERS)] * EACH
        alone = [assessor.check(g) for g in given]
        together = list(callers.map(assessor.check, given))
        difference = max(furthest(a, b) for a, b in zip(together, alone, strict=True))
        name = f"{CALLERS} callers at once, {dtype}"
        report.notes[f"{dtype}: largest difference of a score"] = difference
        if difference > TOLERANCE[dtype]:
            report.refuse(name, f"scores differ by {difference:.2g} from one by one, expected {TOLERANCE[dtype]:g}")
            return
        seconds = interleaved(
            {
                "one by one": lambda: [assessor.check(g) for g in given],
                "at once": lambda: list(callers.map(assessor.check, given)),
            },
            repeats,
        )
    each = {case: [s / len(given) for s in spent] for case, spent in seconds.items()}
    baseline = (f"one by one, {dtype}", each["one by one"])
    report.add(baseline[0], each["one by one"], baseline, unit="ms a prompt")
    bar = BAR if dtype == "float32" else None
    report.add(name, each["at once"], baseline, "gain in throughput", unit="ms a prompt", inverse=True, at_least=bar)
