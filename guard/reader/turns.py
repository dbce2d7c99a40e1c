r"""Token ids of a served request, read back: which the chat template wrote, and where the others stand in the text.

A tap sees ids alone. What a template writes is learned from the template itself: it is rendered around a few short
chats, and the literal text that follows each of its special tokens is remembered (`<|im_start|>`: "user\n", and the
whole of a default system message). In an id stream, special tokens and such text behind them are scaffold; everything
else is the caller's or the model's. Text that a template writes anywhere else, with no special token before it, is read
as if the caller had written it.
"""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from guard.errors import InvalidInput
from guard.reader.sequence import SCAFFOLD, TokenSequence
from guard.reader.tokens import TextTokenizer
from guard.records import Message, Phase, Role

_NOWHERE = (0, 0, 0)
_CHATS = (  # roles of the chats by which a template is learned
    (Role.USER,),
    (Role.SYSTEM, Role.USER),
    (Role.USER, Role.ASSISTANT, Role.USER),
    (Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.USER),
)


@dataclass(frozen=True, slots=True)
class Literal:
    """Text that the template writes behind a special token; `opens`: a message's own text follows."""

    text: bytes
    opens: bool


class Template:
    """A tokenizer's special tokens and what its chat template writes behind each. Nothing where it has no template."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.specials = tokenizer.special_ids
        self.token_bytes = lru_cache(maxsize=None)(tokenizer.token_bytes)  # the vocabulary bounds it
        found: dict[int, dict[bytes, bool]] = {}
        for roles in _CHATS:
            try:
                pieces = tokenizer.chat([Message(role, "x") for role in roles], open_reply=True)
            except InvalidInput:  # a template may refuse a system message, or be absent
                continue
            for number, piece in enumerate(pieces):
                if piece.message < 0:
                    # What ends the last piece opens the reply.
                    self._learn(piece.ids, found, opens=number + 1 == len(pieces) or pieces[number + 1].message >= 0)
        self.literals = {
            special: [Literal(text, opens) for text, opens in texts.items()] for special, texts in found.items()
        }

    def _learn(self, ids: Sequence[int], found: dict[int, dict[bytes, bool]], *, opens: bool) -> None:
        special: int | None = None
        text = b""
        for number in [*ids, None]:
            if number is not None and number not in self.specials:
                text += self.token_bytes(number)
                continue
            if special is not None:
                known = found.setdefault(special, {})
                known[text] = known.get(text, False) or (opens and number is None)
            special, text = number, b""


class Turns:
    """One request's ids on their way into a TokenSequence: the phase and the place of each.

    Places count code points of the decoded text without scaffold: in the prompt of each message anew (`message` is its
    index), in the completion from its beginning. The first token of the prompt is the attention sink and never scored,
    whatever it is. Tokens that may yet turn out to be a role line are held until what follows tells.
    """

    def __init__(self, template: Template, *, sink: bool = True) -> None:
        """`sink`: the ids begin with the prompt's first."""
        self._template, self._sink = template, sink
        self._phase = Phase.PROMPT
        self._message = -1  # before any turn was opened
        self._begin()
        self._behind: list[Literal] = []  # of the special token before: what may still match
        self._known: list[Literal] = []  # all that the template writes there
        self._seen = b""  # text behind it
        self._matched: Literal | None = None
        self._held: list[tuple[int, bytes]] = []
        self.written: set[Phase] = set()  # phases with more than whitespace in them

    def _begin(self) -> None:
        """A text begins: its places count from 0."""
        self._at = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._cut = False  # inside a character

    def append(self, ids: Iterable[int], phase: Phase, tokens: TokenSequence) -> None:
        """Adds `ids` to `tokens`, and those held before; what has to be held comes with a later call."""
        if phase is not self._phase:
            self.flush(tokens)
            self._phase, self._message = phase, 0
            self._begin()
        template = self._template
        for number in ids:
            if number in template.specials:
                self.flush(tokens)
                self._put(tokens, number, _NOWHERE, scored=False)
                self._known = self._behind = template.literals.get(number, [])
                self._seen, self._held = b"", []
                self._matched = next((known for known in self._behind if not known.text), None)
                self._behind = [known for known in self._behind if known.text]
                if not self._behind:
                    self._close(tokens)
            elif self._behind:
                self._held.append((number, template.token_bytes(number)))
                self._match(tokens)
            else:
                self._write(tokens, number, template.token_bytes(number))

    @property
    def holding(self) -> bool:
        return bool(self._held)

    def flush(self, tokens: TokenSequence) -> None:
        """Lets go of what is held: nothing follows that could tell more."""
        if self._behind:
            self._close(tokens)

    def _match(self, tokens: TokenSequence) -> None:
        self._seen += self._held[-1][1]
        for known in self._behind:
            if self._seen.startswith(known.text) and (not self._matched or len(known.text) > len(self._matched.text)):
                self._matched = known
        self._behind = [k for k in self._behind if len(k.text) > len(self._seen) and k.text.startswith(self._seen)]
        if not self._behind and self._matched and not self._matched.opens:
            # A message may begin with what the template would have written itself: what follows tells.
            opening = [known for known in self._known if known.opens and self._seen.startswith(known.text)]
            if opening and len(self._seen) == len(self._matched.text):
                self._behind = [self._matched]
                return
            self._matched = max(opening, key=lambda known: len(known.text), default=self._matched)
        if not self._behind:
            self._close(tokens)

    def _close(self, tokens: TokenSequence) -> None:
        """The text behind the special token has ended: what matched is scaffold, the rest is text."""
        matched, held = self._matched, self._held
        self._behind, self._matched, self._held, self._seen = [], None, [], b""
        if matched and matched.opens and self._phase is Phase.PROMPT:
            self._message += 1
            self._begin()
        left = len(matched.text) if matched else 0
        for number, data in held:
            if left >= len(data):
                self._put(tokens, number, _NOWHERE, scored=False)
            else:
                self._write(tokens, number, data[left:])
            left = max(0, left - len(data))

    def _write(self, tokens: TokenSequence, number: int, data: bytes) -> None:
        start = self._at
        if not self._cut and data.isascii():
            text, self._at, end = data.strip(), start + len(data), start + len(data)
            written = bool(text)
        else:
            decoded = self._decoder.decode(data)
            self._cut = bool(self._decoder.getstate()[0])
            self._at = start + len(decoded)
            end = self._at + self._cut  # a token that ends inside a character touches it
            written = bool(decoded.strip())
        if written:
            self.written.add(self._phase)
        self._put(tokens, number, (start, end, max(self._message, 0)), scored=True)

    def _put(self, tokens: TokenSequence, number: int, where: tuple[int, int, int], *, scored: bool) -> None:
        sink = self._sink and not tokens.ids
        tokens.put(number, where, self._phase if scored and not sink else SCAFFOLD)
