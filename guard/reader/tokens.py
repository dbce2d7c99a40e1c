"""Text to token ids and back to character offsets, for whole texts, chats and streams. No torch.

Offsets count Unicode code points of the caller's own text, end exclusive. Caller text never turns into control tokens:
`<|im_start|>` typed by a user is read as the characters it is made of.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer as FastTokenizer

from guard.errors import InvalidInput, WeightsError
from guard.records import Message

Span = tuple[int, int]

# Byte-level vocabularies write each byte as one printable character: most as the character of that number, the others
# as those from U+0100 on.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}

_TAIL = 16  # tokens at the end of a long word that may yet change; 4 is the most that was ever seen to


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens from one place: a message of the caller (`message` is its index), or the template (-1)."""

    ids: list[int]
    spans: list[Span]
    message: int = -1


class TextTokenizer:
    """The model's tokenizer, with the two modes kept apart: caller text, and the chat template's own control tokens."""

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if not file.exists():
            raise WeightsError(f"model folder {folder}: missing tokenizer.json")
        try:
            source = file.read_text(encoding="utf-8")
            self._control = FastTokenizer.from_str(source)
            # Without its added tokens a tokenizer reads their names as plain characters.
            self._literal = FastTokenizer.from_str(json.dumps(json.loads(source) | {"added_tokens": []}))
        except Exception as error:  # noqa: BLE001 - the library raises that class itself
            raise WeightsError(f"{file}: found no tokenizer that can be read: {error}") from None
        for tokenizer in (self._literal, self._control):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._template_source = _template_source(folder)
        self.sink_id = self._find_sink()

    def text(self, text: str, message: int = 0) -> Piece:
        """Tokens of caller text, with the span of each. Raises InvalidInput for lone surrogates."""
        check_text(text)
        encoding = self._literal.encode(text, add_special_tokens=False)
        return Piece(encoding.ids, [(start, end) for start, end in encoding.offsets], message)

    def chat(self, messages: Sequence[Message], *, open_reply: bool) -> list[Piece]:
        """The chat through the model's own template, as pieces in reading order.

        The template is rendered with a mark in place of each message, so that what callers wrote is tokenised apart
        from the template's control tokens. `open_reply` ends the prompt where the assistant's answer begins.
        """
        marks = [f"\ue000{index}\ue001" for index in range(len(messages))]
        try:
            rendered = self._template.render(
                messages=[{"role": m.role.value, "content": mark} for m, mark in zip(messages, marks, strict=True)],
                add_generation_prompt=open_reply,
                bos_token="",
                eos_token="",
            )
        except jinja2.TemplateError as error:
            raise InvalidInput(
                f"the model's chat template cannot be used: {error}; send plain text", reason="NO_CHAT_TEMPLATE"
            ) from None
        pieces = []
        for index, (message, mark) in enumerate(zip(messages, marks, strict=True)):
            before, found, rendered = rendered.partition(mark)
            if not found:
                raise InvalidInput(f"the model's chat template leaves out message {index} ({message.role.value})")
            pieces += [self._scaffold(before), self.text(message.content, index)]
        return [piece for piece in [*pieces, self._scaffold(rendered)] if piece.ids]

    @cached_property
    def _template(self) -> jinja2.Template:
        """Compiled for the first chat: a template that cannot be used leaves plain texts alone."""
        if self._template_source is None:
            raise InvalidInput("the model has no chat template: send plain text", reason="NO_CHAT_TEMPLATE")
        # A template comes with somebody's weights: it is rendered in a sandbox.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )

        def raise_exception(message: str) -> None:
            raise InvalidInput(f"the model's chat template refuses this chat: {message}")

        environment.globals["raise_exception"] = raise_exception
        return environment.from_string(self._template_source)

    def settle(self, text: str) -> tuple[Piece, int, int]:
        """The leading tokens of `text` that stay whatever comes behind, their characters, and how many tokens remain.

        What remains is read later as it would be now: the tokens of a stream are those of its whole text.
        """
        whole = self.text(text)
        for kept in sorted(self._settled(text, whole), reverse=True):
            taken = whole.spans[kept - 1][1]
            rest = self._literal.encode(text[taken:], add_special_tokens=False).ids
            if rest == whole.ids[kept:]:
                return Piece(whole.ids[:kept], whole.spans[:kept], whole.message), taken, len(rest)
        return Piece([], [], whole.message), 0, len(whole.ids)

    def _settled(self, text: str, whole: Piece) -> Iterator[int]:
        """Numbers of leading tokens that no later text changes."""
        # A byte-level tokenizer merges only inside a word, so all words but the last two are settled: the last may
        # grow, and the one before it may yet join it (`'` and `r` are two words, `'re` is one).
        pre_tokenizer = self._literal.pre_tokenizer
        words = pre_tokenizer.pre_tokenize_str(text) if pre_tokenizer is not None else []
        if len(words) > 1 and (kept := sum(end <= words[-2][1][0] for _, end in whole.spans)):
            yield kept
        # A word may be as long as the text (Chinese, base64): what is added changes no more than its last few tokens.
        kept = len(whole.ids) - _TAIL
        while kept > 0 and whole.spans[kept][0] < whole.spans[kept - 1][1]:  # inside a character
            kept -= 1
        if kept > 0:
            yield kept

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the control tokens, which no text is made of."""
        return frozenset(number for number, token in self._control.get_added_tokens_decoder().items() if token.special)

    def token_bytes(self, number: int) -> bytes:
        """What a token that is not special writes; nothing for a number that no token has."""
        token = self._control.id_to_token(number)
        if token is None:
            return b""
        if number in self._added:
            return token.encode()
        if self._byte_level:
            return bytes(_BYTES[character] for character in token if character in _BYTES)
        if len(token) == len("<0x00>") and token.startswith("<0x"):  # how other vocabularies write a byte
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._control.get_added_tokens_decoder())

    @cached_property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self._control.to_str())["decoder"])

    def _scaffold(self, text: str) -> Piece:
        ids = self._control.encode(text, add_special_tokens=False).ids if text else []
        return Piece(ids, [(0, 0)] * len(ids))

    def _find_sink(self) -> int:
        # The first position of a sequence draws attention and an outsized norm whatever stands there. An end-of-text
        # token takes that place, so that no token of the caller does.
        for token in ("<|endoftext|>", "<|end_of_text|>", "<s>", "<bos>", "</s>"):
            if (found := self._control.token_to_id(token)) is not None:
                return int(found)
        return 0


def check_text(text: str) -> None:
    """Raises InvalidInput where `text` is not valid Unicode (a lone surrogate)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"text is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}",
            reason="INVALID_UNICODE",
        ) from None


def _template_source(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    if not config.exists():
        return None
    try:
        given = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"{config}: found no JSON object: {error}") from None
    return given if isinstance(given, str) else None
