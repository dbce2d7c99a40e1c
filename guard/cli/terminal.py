"""What reaches the terminal: consoles, JSON, and text made harmless."""

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Controls that move the cursor, colour the screen, or reorder what is read: callers' text must not do that to an
# analyst's terminal. Each is replaced by one character, so that offsets stay.
_HIDDEN = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)}
_HIDDEN |= {0x7F: 0x2421}
_HIDDEN |= dict.fromkeys(
    [*range(0x80, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD
)


def visible(text: str) -> str:
    """`text` with controls and lone surrogates shown, not obeyed; as many characters as before."""
    shown = text.translate(_HIDDEN)
    return shown if shown.isascii() else "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in shown)


def out() -> "Console":
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def err() -> "Console":
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def json_line(value: Any, *, utf8: bool | None = None) -> str:
    """One line of JSON; as UTF-8 where the stream takes it (`utf8` None asks stdout), else with escapes."""
    if utf8 is None:
        utf8 = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf8")
    line = json.dumps(value, ensure_ascii=not utf8, allow_nan=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # an id with a lone surrogate
        line = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return line
