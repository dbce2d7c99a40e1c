"""What a caller may send: sizes, Unicode, options. Bad input gets an error that says what was found and expected."""

from collections.abc import Sequence

from guard.config import LimitsConfig
from guard.errors import InvalidInput, NotFound
from guard.reader.tokens import check_text
from guard.records import CheckInput, CheckOptions

MAX_ATTRIBUTIONS = 100


def chosen_domains(options: CheckOptions, known: tuple[str, ...]) -> tuple[str, ...]:
    """The domains asked for, or all of `known`. Raises NotFound for another one, InvalidInput for a bad option."""
    if not 0 <= options.max_attributions <= MAX_ATTRIBUTIONS:
        raise InvalidInput(
            f"max_attributions: found {options.max_attributions}, expected 0 to {MAX_ATTRIBUTIONS}",
            reason="INVALID_OPTION",
        )
    for domain in options.domains:
        if domain not in known:
            raise NotFound(
                f"unknown domain {domain!r}, expected one of: {', '.join(known)}",
                reason="UNKNOWN_DOMAIN",
            )
    return tuple(dict.fromkeys(options.domains)) or known


def check_input(given: CheckInput, limits: LimitsConfig) -> None:
    """Raises InvalidInput for text that is absent, blank, too large, or not valid Unicode."""
    texts = [given.prompt] if isinstance(given.prompt, str) else [m.content for m in given.prompt or ()]
    if given.prompt is None and given.completion is None:
        raise InvalidInput("found neither a prompt nor a completion", reason="EMPTY_TEXT")
    if isinstance(given.prompt, tuple) and len(given.prompt) > limits.messages:
        raise InvalidInput(
            f"chat: found {len(given.prompt)} messages, the limit is {limits.messages} (limits.messages)",
            reason="TOO_MANY_MESSAGES",
        )
    _check_texts("prompt", texts, limits, required=given.prompt is not None)
    _check_texts("completion", [given.completion or ""], limits, required=given.completion is not None)


def _check_texts(name: str, texts: Sequence[str], limits: LimitsConfig, *, required: bool) -> None:
    size = 0
    for text in texts:
        check_text(text)
        size += len(text.encode())
    if size > limits.text_bytes:
        raise InvalidInput(
            f"{name}: found {size} bytes, the limit is {limits.text_bytes} (limits.text_bytes)",
            reason="TEXT_TOO_LARGE",
            limit=limits.text_bytes,
        )
    if required and not any(text.strip() for text in texts):
        found = "only whitespace" if any(texts) else "an empty text"
        raise InvalidInput(f"{name}: found {found}, expected text", reason="EMPTY_TEXT")
