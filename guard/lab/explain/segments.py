"""Segments: where a window is cut, by a stated rule.

    1. A cut falls between two tokens, at a blank or behind Chinese punctuation: never inside a word, and in Chinese,
       which leaves no blanks, never inside a clause.
    2. From the left, each segment takes `size` tokens, give or take half: it ends at the best cut within that reach, a
       sentence's end (or a line's) before other punctuation before a blank, and among equals at the one nearest to
       `size` (the earlier of two as near).
    3. Where no cut is within reach, the segment runs on to the next one.
    4. What is left is one segment as soon as it is within reach as a whole; so no segment is under half of `size`,
       unless the whole window is.

The truth of a segment is the latent's greatest strength in it; the latent fires in it where that is above 0.
"""

import re
from collections.abc import Sequence

RULE = "segments-1"  # goes with the scores; another rule is another number

Span = tuple[int, int]  # first token, one past the last

_CLOSING = "\"'”’)]」』）》"  # noqa: RUF001 - Chinese punctuation, as below
_STOPS, _PAUSES = "。！？…", "，、；："  # noqa: RUF001
_SENTENCE = re.compile(rf"([.!?{_STOPS}][{re.escape(_CLOSING)}]*|\n)\s*$")
_PAUSE = re.compile(rf"[,;:—{_PAUSES}{re.escape(_CLOSING)}]\s*$")
_WIDE = re.compile(rf"[{_STOPS}{_PAUSES}][{re.escape(_CLOSING)}]*$")
_LOOK_BACK = 12  # characters in which a sentence's end and what closes behind it stand


def cut(tokens: Sequence[str], size: int) -> list[Span]:
    """The segments of a window, in order and without gaps."""
    least, most = max(size // 2, 1), size + size // 2
    rank = _ranks(tokens)
    count = len(tokens)
    result = []
    start = 0
    while count - start > most:
        near = [i for i in range(start + least, min(start + most, count - least) + 1) if rank[i]]
        far = (i for i in range(start + most + 1, count - least + 1) if rank[i])
        end = max(near, key=lambda i: (rank[i], -abs(i - start - size))) if near else next(far, count)
        result.append((start, end))
        start = end
    return [*result, (start, count)] if start < count else result


def peaks(values: Sequence[float], spans: Sequence[Span]) -> list[float]:
    """The greatest of `values` in each segment."""
    return [max(values[start:end]) for start, end in spans]


def _ranks(tokens: Sequence[str]) -> list[int]:
    """Before each token: 0 no cut, 1 a blank, 2 punctuation, 3 the end of a sentence or a line."""
    text = "".join(tokens)
    result = []
    place = 0
    for token in tokens:
        result.append(_rank(text[max(place - _LOOK_BACK, 0) : place], token) if place and token else 0)
        place += len(token)
    return result


def _rank(before: str, after: str) -> int:
    blank = before[-1].isspace() or after[0].isspace()
    if not blank and (not _WIDE.search(before) or after[0] in _CLOSING + _STOPS + _PAUSES):
        return 0
    if _SENTENCE.search(before):
        return 3
    return 2 if _PAUSE.search(before) else 1
