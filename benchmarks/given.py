"""Texts of an exact number of tokens, assessors with settings of their own, and how answers are compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guard.assessor import Assessor
from guard.config import load_config
from guard.reader.tokens import TextTokenizer
from guard.records import Verdict

PARAGRAPH = (
    "The harbour was quiet when the last boat came in, and nobody on the quay asked where it had been. A clerk wrote "
    "its number into a ledger, closed the window against the wind, and went on reading about the vote in the capital. "
    "Two men argued over the price of diesel; a third said that prices follow wars, and that wars follow elections. "
    "By morning the ice had melted, the fish were sold, and the argument had moved on to football and the weather. "
)


@contextmanager
def assessing(pack: Path, **reader: object) -> Iterator[Assessor]:
    assessor = Assessor.load(load_config(overrides={"pack": str(pack), "reader": reader}))
    try:
        yield assessor
    finally:
        assessor.close()


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
