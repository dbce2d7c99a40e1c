"""Many open streams fed in turn: memory and time for each, steps read together or one by one; and one long stream.

Chunks are of 16 tokens; each stream ends with 64. All chunks of a round are fed at once, as callers of a server would.
"""

import itertools
import os
import time
from pathlib import Path

from benchmarks.figures import Report
from benchmarks.given import assessing, furthest, text_of
from guard.assessor import Assessor
from guard.assessor.caches import Caches
from guard.assessor.session import Session
from guard.config import SessionsConfig
from guard.records import CheckInput, Phase, Verdict

STREAMS = (64, 256, 1000)
CHUNK, CHUNKS = 16, 4  # tokens, and how many of them
LONGEST, STRIDE = 8192, 32
TOLERANCE = 1e-3


def run(report: Report, pack: Path, repeats: int) -> None:
    del repeats  # every stream and round is one
    with assessing(pack, "float32") as (assessor, _):
        limits = SessionsConfig(limit=2 * STREAMS[-1], cache_bytes=8 << 30)
        assessor.config = assessor.config.model_copy(update={"sessions": limits})
        assessor.caches = Caches(limits.cache_bytes)
        text = text_of(assessor.pipeline.tokenizer, CHUNK * CHUNKS)
        chunks = _chunks(assessor, text, CHUNK)
        whole = assessor.check(CheckInput(text))
        assessor.batcher._batch_tokens = 1  # noqa: SLF001 - nothing joins a batch
        by_itself, _ = _round(report, assessor, STREAMS[0], chunks, whole)
        assessor.batcher._batch_tokens = assessor.config.reader.batch_tokens  # noqa: SLF001 - as before
        baseline = (f"{STREAMS[0]} streams, one by one", by_itself)
        report.add(baseline[0], by_itself, baseline, "gain in speed", unit="ms a chunk", inverse=True)
        for count in STREAMS:
            each, note = _round(report, assessor, count, chunks, whole)
            name = f"{count} streams, steps together"
            report.add(name, each, baseline, "gain in speed", unit="ms a chunk", inverse=True)
            report.notes[name] = note
        _long(report, assessor)


def _chunks(assessor: Assessor, text: str, tokens: int) -> list[str]:
    spans = assessor.pipeline.tokenizer.text(text).spans
    cuts = [0, *(spans[at][0] for at in range(tokens, len(spans), tokens)), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(cuts)]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _round(
    report: Report, assessor: Assessor, count: int, chunks: list[str], whole: Verdict
) -> tuple[list[float], str]:
    """Seconds a chunk in each round over all streams, and what a stream takes of memory."""
    before = _resident()
    streams: list[Session] = [assessor.open_session() for _ in range(count)]
    queued = assessor.batcher._queue_size  # noqa: SLF001 - every stream feeds one chunk at a time, as callers would
    seconds, verdicts = [], []
    for number, chunk in enumerate(chunks):
        started = time.perf_counter()
        futures = [stream.feed(Phase.PROMPT, chunk, last=number == len(chunks) - 1) for stream in streams]
        verdicts = [future.result() for future in futures]
        seconds.append((time.perf_counter() - started) / count)
    taken, held = (_resident() - before) / count, assessor.session_bytes / count
    difference = max(furthest(verdict, whole) for verdict in verdicts)
    for stream in streams:
        stream.close()
    if difference > TOLERANCE:
        report.refuse(f"{count} streams", f"scores differ by {difference:.2g} from one check, expected {TOLERANCE:g}")
    return seconds, (
        f"{taken / 1e6:.2f} MB resident a stream, {held / 1e6:.2f} MB of keys and values; largest difference of a "
        f"score {difference:.1g}; queue of {queued}"
    )


def _long(report: Report, assessor: Assessor) -> None:
    """What a token costs at the beginning of one stream and at its end, windows that are read anew included."""
    stream = assessor.open_session()
    spent: dict[int, list[float]] = {}
    chunks = _chunks(assessor, text_of(assessor.pipeline.tokenizer, LONGEST), STRIDE)
    for number, chunk in enumerate(chunks):
        started = time.perf_counter()
        stream.feed(Phase.PROMPT, chunk).result()
        spent.setdefault(number * STRIDE // 1024, []).append((time.perf_counter() - started) / STRIDE)
    held = stream._stream.nbytes if stream._stream is not None else 0  # noqa: SLF001 - its size
    stream.close()
    means = {part: [sum(times) / len(times)] for part, times in spent.items()}
    for part, mean in means.items():
        name = f"one stream, tokens {1024 * part} to {1024 * (part + 1)}"
        report.add(name, mean, ("the first 1,024", means[0]), unit="ms a token", paired=False)
    report.notes[f"MB of keys and values at {LONGEST} tokens"] = held / 1e6
