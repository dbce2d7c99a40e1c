"""What a caller of 16 tokens waits beside long texts, by the tokens that a text is read in at once.

Beside nobody; beside one text of 15,000 tokens; beside 8 callers of 1,000 tokens. The figure is the median check, the
notes hold its 99th percentile and what the long texts lose.
"""

import threading
import time
from concurrent.futures import Future
from pathlib import Path

from benchmarks.figures import Report, spread
from benchmarks.given import assessing, furthest, text_of
from guard.assessor import Assessor
from guard.records import CheckInput, Verdict

STEPS = {"windows of 1,024": (1024, 2048), "steps of 256": (256, 512), "steps of 128": (128, 512)}  # step, batch
SECONDS, LONG, MIDDLE, CALLERS = 6.0, 15_000, 1000, 8
TOLERANCE = 1e-4


def run(report: Report, pack: Path, repeats: int) -> None:
    del repeats  # one caller's many checks are the repeats
    with assessing(pack, "float32") as (assessor, _):
        tokenizer = assessor.pipeline.tokenizer
        short, long, middle = (CheckInput(text_of(tokenizer, n)) for n in (16, LONG, MIDDLE))
        expected: Verdict | None = None
        alone: list[float] = []
        for name, (step, batch) in STEPS.items():
            assessor.pipeline._step, assessor.batcher._batch_tokens = step, batch  # noqa: SLF001 - settings under test
            found = assessor.check(middle)
            expected = expected or found
            if (difference := furthest(found, expected)) > TOLERANCE:
                report.refuse(name, f"scores differ by {difference:.2g}, expected {TOLERANCE:g}")
                continue
            report.notes[f"largest difference of a score, {name}"] = difference
            for beside, busy, many in (("nobody", None, 0), ("15,000 tokens", long, 1), ("8 x 1,000", middle, CALLERS)):
                waits, tokens = _beside(assessor, short, busy, many)
                alone = alone or waits
                what = f"beside {beside}, {name}"
                report.add(what, waits, ("beside nobody", [spread(alone)[1]] * len(waits)))
                tail = sorted(waits)[int(0.99 * (len(waits) - 1))]
                report.notes[what] = f"p99 {tail * 1e3:.0f} ms of {len(waits)}; the others read {tokens:,.0f} tokens/s"


def _beside(assessor: Assessor, short: CheckInput, busy: CheckInput | None, callers: int) -> tuple[list[float], float]:
    """Seconds of each check of `short`, and how many tokens a second the others had read."""
    ends, read, lock = threading.Event(), [0], threading.Lock()
    meter = assessor.observer.batch

    def batch(sequences: int, tokens: int, seconds: dict[str, float]) -> None:
        with lock:
            read[0] += tokens
        meter(sequences, tokens, seconds)

    def caller() -> None:
        while busy is not None and not ends.is_set():
            future: Future[Verdict] = assessor.submit(busy)
            while not future.done() and not ends.wait(0.005):
                pass
            future.cancel()

    assessor.observer.batch = batch  # type: ignore[method-assign]
    threads = [threading.Thread(target=caller) for _ in range(callers)]
    for thread in threads:
        thread.start()
    waits: list[float] = []
    started = time.perf_counter()
    while (begun := time.perf_counter()) < started + SECONDS:
        assessor.check(short)
        waits.append(time.perf_counter() - begun)
        time.sleep(0.02)
    rate = (read[0] - 17 * len(waits)) / (time.perf_counter() - started)
    ends.set()
    for thread in threads:
        thread.join()
    assessor.observer.batch = meter  # type: ignore[method-assign]
    return waits, rate
