"""Text to token ids and back to character offsets, for whole texts, chats and streams. No torch.

Offsets count Unicode code points of the caller's own text, end exclusive. Caller text never turns into control tokens:
`<|im_start|>` typed by a user is read as the characters it is made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer as FastTokenizer

from guard.errors import InvalidInput, WeightsError
from guard.records import Message, Role

Span = tuple[int, int]


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
        self._literal = FastTokenizer.from_file(str(file))
        self._literal.encode_special_tokens = True  # special tokens in the text are plain characters
        self._control = FastTokenizer.from_file(str(file))
        for tokenizer in (self._literal, self._control):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._template = _load_template(folder)
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
        if self._template is None:
            raise InvalidInput("the model has no chat template: send plain text", reason="NO_CHAT_TEMPLATE")
        marks = [f"\ue000{index}\ue001" for index in range(len(messages))]
        rendered = self._template.render(
            messages=[{"role": m.role.value, "content": mark} for m, mark in zip(messages, marks, strict=True)],
            add_generation_prompt=open_reply,
            bos_token="",
            eos_token="",
        )
        pieces = []
        for index, (message, mark) in enumerate(zip(messages, marks, strict=True)):
            before, found, rendered = rendered.partition(mark)
            if not found:
                raise InvalidInput(f"the model's chat template leaves out message {index} ({message.role.value})")
            pieces += [self._scaffold(before), self.text(message.content, index)]
        return [piece for piece in [*pieces, self._scaffold(rendered)] if piece.ids]

    def reply_opening(self, messages: Sequence[Message]) -> list[Piece]:
        return self.chat(messages, open_reply=True)

    def settle(self, text: str) -> tuple[Piece, int, int]:
        """The leading tokens of `text` that stay whatever comes behind, their characters, and how many tokens remain.

        A byte-level tokenizer merges only inside a word, so all words but the last two are settled: the last may grow,
        and the one before it may yet join it (`'` and `r` are two words, `'re` is one).
        """
        whole = self.text(text)
        pre_tokenizer = self._literal.pre_tokenizer
        words = pre_tokenizer.pre_tokenize_str(text) if pre_tokenizer is not None else []
        taken = int(words[-2][1][0]) if len(words) > 1 else 0
        # Cut from the tokens of all of it: spaces at the end of a text are split otherwise than before a word.
        kept = sum(end <= taken for _, end in whole.spans)
        return Piece(whole.ids[:kept], whole.spans[:kept], whole.message), taken, len(whole.ids) - kept

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


def _load_template(folder: Path) -> jinja2.Template | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        source = file.read_text(encoding="utf-8")
    else:
        import json

        config = folder / "tokenizer_config.json"
        given = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.exists() else None
        if not isinstance(given, str):
            return None
        source = given
    # A template comes with somebody's weights: it is rendered in a sandbox.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> None:
        raise InvalidInput(f"the model's chat template refuses this chat: {message}")

    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


ROLES = tuple(role.value for role in Role)
