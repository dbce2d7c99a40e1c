"""What a token of a stream costs, early and late, and what whole texts of growing length cost."""

import time
from pathlib import Path

from benchmarks.figures import Report, interleaved
from benchmarks.given import assessing, furthest, text_of
from guard.assessor import Assessor
from guard.records import CheckInput, Phase, Verdict

LENGTHS = (64, 128, 256, 512, 1024, 2048)
WORDS = 4  # words a chunk
STREAMS = 3
TOLERANCE = 1e-3
BAR = 1.5

Step = tuple[int, int, float]  # tokens read so far, tokens of this chunk, seconds


def run(report: Report, pack: Path, repeats: int) -> None:
    with assessing(pack, "float32") as (assessor, _):
        text = text_of(assessor.pipeline.tokenizer, LENGTHS[-1])
        _streams(report, assessor, text, min(repeats, STREAMS))
        _whole_texts(report, assessor, repeats)


def _streams(report: Report, assessor: Assessor, text: str, repeats: int) -> None:
    """Whole streams from the first token to the last, so that the step into a new window is among the chunks."""
    cost: dict[int, list[float]] = {length: [] for length in LENGTHS}
    means: list[float] = []
    once: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        whole = assessor.check(CheckInput(text))
        once.append((time.perf_counter() - started) / LENGTHS[-1])
        steps, difference = _stream(assessor, text, whole)
        if difference > TOLERANCE:
            report.refuse("stream", f"scores differ by {difference:.2g} from one check, expected {TOLERANCE:g}")
            return
        report.notes["largest difference of a score from one check"] = difference
        means.append(sum(seconds for *_, seconds in steps) / LENGTHS[-1])
        for length in LENGTHS:
            near = [(count, seconds) for at, count, seconds in steps if length - 64 < at <= length and count]
            cost[length] += [seconds / count for count, seconds in near]
    baseline = (f"a stream near token {LENGTHS[0]}", cost[LENGTHS[0]])
    for length in LENGTHS:
        bar = BAR if length != LENGTHS[0] else None
        report.add(f"a stream near token {length}", cost[length], baseline, unit="ms a token", paired=False, below=bar)
    report.add("a whole stream, mean", means, baseline, unit="ms a token", paired=False, below=BAR)
    report.add("a whole stream, mean", means, (f"one check of {LENGTHS[-1]} tokens", once), unit="ms a token")


def _stream(assessor: Assessor, text: str, whole: Verdict) -> tuple[list[Step], float]:
    words = text.split(" ")
    chunks = [" ".join(words[i : i + WORDS]) + " " * (i + WORDS < len(words)) for i in range(0, len(words), WORDS)]
    session = assessor.open_session()
    steps: list[Step] = []
    read = 0
    for number, chunk in enumerate(chunks):
        started = time.perf_counter()
        verdict = session.feed(Phase.PROMPT, chunk, last=number == len(chunks) - 1).result()
        seconds = time.perf_counter() - started
        now = verdict.phases[0].tokens_read
        steps.append((now, now - read, seconds))
        read = now
    session.close()
    return steps, furthest(verdict, whole)


def _whole_texts(report: Report, assessor: Assessor, repeats: int) -> None:
    texts = {length: text_of(assessor.pipeline.tokenizer, length) for length in LENGTHS}
    for length, text in texts.items():
        found = assessor.check(CheckInput(text)).phases[0].tokens_read
        if found != length:
            report.refuse(f"one check of {length} tokens", f"found {found} tokens read")
            return
    cases = {str(length): (lambda t=text: assessor.check(CheckInput(t))) for length, text in texts.items()}
    seconds = {int(length): [s / int(length) for s in spent] for length, spent in interleaved(cases, repeats).items()}
    baseline = (f"one check of {LENGTHS[0]} tokens", seconds[LENGTHS[0]])
    for length, spent in seconds.items():
        report.add(f"one check of {length} tokens", spent, baseline, unit="ms a token")
