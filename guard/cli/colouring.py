"""A text with each character's background by what it adds to a head."""

import unicodedata
from collections.abc import Sequence

from rich.text import Text

from guard.cli.terminal import visible
from guard.records import SpanContribution

_JOINER = "\u200d"
_VARIANTS = frozenset(map(chr, (*range(0xFE00, 0xFE10), *range(0x1F3FB, 0x1F400))))  # selectors, skin tones
EXCERPT = 1200  # characters of a long text that are shown


def coloured(text: str, parts: Sequence[SpanContribution]) -> Text:
    """`text` with each character's background by the contributions that fall on it; long text around the strongest."""
    begin, end = _excerpt(text, parts)
    amounts = [0.0] * (end - begin)
    for part in parts:
        for i in range(max(part.start, begin), min(part.end, end)):
            amounts[i - begin] += part.contribution
    most = max(map(abs, amounts), default=0.0)
    shown = Text(visible(text[begin:end]))
    start = 0
    for i in range(1, len(amounts) + 1):
        if i == len(amounts) or (amounts[i] != amounts[start] and not _joined(text, begin + i)):
            if style := _background(amounts[start], most):
                shown.stylize(style, start, i)
            start = i
    if begin:
        shown = Text.assemble((f"[{begin:,} characters before] ", "dim"), shown)
    if end < len(text):
        shown.append(f" [{len(text) - end:,} characters after]", "dim")
    return shown


def _joined(text: str, at: int) -> bool:
    """Whether the character there is shown as one with those before it: rich would mismeasure the halves, and crop."""
    here, before = text[at], text[at - 1]
    return _JOINER in (before, here) or here in _VARIANTS or unicodedata.category(here) in {"Mn", "Me", "Mc"}


def _excerpt(text: str, parts: Sequence[SpanContribution]) -> tuple[int, int]:
    if len(text) <= EXCERPT:
        return 0, len(text)
    strongest = max(parts, key=lambda part: abs(part.contribution), default=None)
    middle = strongest.start if strongest else 0
    begin = min(max(0, middle - EXCERPT // 2), len(text) - EXCERPT)
    return begin, begin + EXCERPT


def _background(amount: float, most: float) -> str:
    strength = abs(amount) / most if most else 0.0
    if strength < 0.08:
        return ""
    level = 70 + round(150 * strength)
    return f"white on rgb({level},25,25)" if amount > 0 else f"white on rgb(25,50,{level})"
