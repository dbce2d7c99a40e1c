"""Texts of an exact number of tokens, assessors with settings of their own, and how answers are compared."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from guard.assessor import Assessor, Observer
from guard.assessor.pipeline import Pipeline, Unit
from guard.config import load_config
from guard.reader.batching import Job
from guard.reader.tokens import TextTokenizer
from guard.records import Verdict

PARAGRAPH = (
    "The harbour was quiet when the last boat came in, and nobody on the quay asked where it had been. A clerk wrote "
    "its number into a ledger, closed the window against the wind, and went on reading about the vote in the capital. "
    "Two men argued over the price of diesel; a third said that prices follow wars, and that wars follow elections. "
    "By morning the ice had melted, the fish were sold, and the argument had moved on to football and the weather. "
)


class Shared(Pipeline):
    """Pipelines that take turns on one worker thread; `now` is the one in use.

    A second thread that multiplies makes every product of the process slower (by two fifths on 2 cores), since OpenMP
    then counts more threads than cores and lets them sleep between any two products.
    """

    def __init__(self, first: Pipeline) -> None:
        self.now = first

    def __getattr__(self, name: str) -> Any:
        return getattr(self.now, name)

    def run(self, units: Sequence[Any]) -> None:
        if isinstance(units[0], Unit):
            super().run(units)
        else:
            units[0]()


@contextmanager
def assessing(pack: Path, *dtypes: str) -> Iterator[tuple[Assessor, dict[str, Callable[[], None]]]]:
    """An assessor, and for each dtype what makes it read in that one (at first: in the first)."""
    configs = {dtype: load_config(overrides={"pack": str(pack), "reader": {"dtype": dtype}}) for dtype in dtypes}
    pipelines = {dtype: Pipeline(config, report=lambda _: None) for dtype, config in configs.items()}
    shared = Shared(pipelines[dtypes[0]])
    assessor = Assessor(configs[dtypes[0]], shared, Observer())
    try:
        yield assessor, {dtype: partial(setattr, shared, "now", own) for dtype, own in pipelines.items()}
    finally:
        assessor.close()


def on_worker(assessor: Assessor, work: Callable[[], object]) -> None:
    """Runs `work` on the thread that owns the model."""
    future: Future[None] = Future()

    def finish(error: Exception | None) -> None:
        if error is not None:
            raise error

    assessor.batcher.put(Job(deque([work]), lambda _: 1 << 30, finish, future))
    future.result()


def text_of(tokenizer: TextTokenizer, tokens: int, skip: int = 0) -> str:
    """Text that the tokenizer splits into exactly `tokens` tokens; `skip` words are left out in front."""
    words = (PARAGRAPH * (1 + tokens // 60)).split(" ")[skip:]
    text = " ".join(words)
    text = text[: tokenizer.text(text).spans[tokens - 1][1]]
    found = len(tokenizer.text(text).ids)
    if found != tokens:
        raise AssertionError(f"text: found {found} tokens, expected {tokens}")
    return text


def scores(verdict: Verdict) -> dict[tuple[str, str, str], float]:
    return {(p.phase, d.domain, h.head): h.score for p in verdict.phases for d in p.domains for h in d.heads}


def furthest(found: Verdict, expected: Verdict) -> float:
    """The largest difference of any score; infinite where they do not have the same heads."""
    ours, theirs = scores(found), scores(expected)
    if ours.keys() != theirs.keys() or not ours:
        return float("inf")
    return max(abs(ours[name] - theirs[name]) for name in ours)
