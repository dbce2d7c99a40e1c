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


def check_input(given: CheckInput, limits: LimitsConfig) -> int:
    """The UTF-8 bytes of the text. Raises InvalidInput where it is absent, blank, too large, or not valid Unicode."""
    texts = [given.prompt] if isinstance(given.prompt, str) else [m.content for m in given.prompt or ()]
    if given.prompt is None and given.completion is None:
        raise InvalidInput("found neither a prompt nor a completion", reason="EMPTY_TEXT")
    if isinstance(given.prompt, tuple):
        check_count(len(given.prompt), limits)
    completion = [] if given.completion is None else [given.completion]
    for text in (*texts, *completion):
        check_text(text)
    size = check_size((*texts, *completion), limits)
    _check_blank("prompt", texts, required=given.prompt is not None)
    _check_blank("completion", completion, required=given.completion is not None)
    return size


def check_count(messages: int, limits: LimitsConfig) -> None:
    """Raises InvalidInput for a chat of more messages than are read."""
    if messages > limits.messages:
        raise InvalidInput(
            f"chat: found {messages} messages, the limit is {limits.messages} (limits.messages)",
            reason="TOO_MANY_MESSAGES",
        )


def check_size(texts: Sequence[str], limits: LimitsConfig, *, before: int = 0) -> int:
    """The UTF-8 bytes of a request's `texts`, and of those `before` them. Raises InvalidInput over the limit."""
    size = before + sum(len(text.encode()) for text in texts)
    if size > limits.text_bytes:
        raise InvalidInput(
            f"text: found {size} bytes in all, the limit is {limits.text_bytes} (limits.text_bytes)",
            reason="TEXT_TOO_LARGE",
            limit=limits.text_bytes,
        )
    return size


def _check_blank(name: str, texts: Sequence[str], *, required: bool) -> None:
    if required and not any(text.strip() for text in texts):
        found = "only whitespace" if any(texts) else "an empty text"
        raise InvalidInput(f"{name}: found {found}, expected text", reason="EMPTY_TEXT")
