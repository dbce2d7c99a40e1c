"""Tokens as people read them: their texts, their forms, and those that a decoder direction raises."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

_BROKEN = "\ufffd"  # where bytes make no character
_LONGEST = 8  # tokens that one character may be split into
_OUTPUTS = 10
_BATCH = 256  # decoder directions whose logits over the whole vocabulary stand in memory together


class TokenTexts:
    """The text of every token of a model's vocabulary."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # Behind another token: some decoders drop the space that a text begins with.
        self._before = self._tokenizer.encode("a", add_special_tokens=False).ids
        self._skip = len(self._tokenizer.decode(self._before, skip_special_tokens=False))
        self.texts = [self._decoded((i,)) for i in range(self._tokenizer.get_vocab_size())]
        self._joined: dict[tuple[int, ...], str] = {}
        self._same = defaultdict(list)
        for i in range(len(self.texts)):
            self._same[self.form(i)].append(i)

    def form(self, token: int) -> str:
        """What its spellings share: case and the space before a word do not count. A broken character has no other."""
        text = self.texts[token].strip().lower()
        return text if text and _BROKEN not in text else f"<{token}>"

    def alike(self, forms: Iterable[str]) -> list[int]:
        """All tokens of these forms."""
        return [token for form in forms for token in self._same[form]]

    def split(self, ids: Iterable[int]) -> tuple[list[str], list[int]]:
        """Texts that joined are the text of `ids`, and where each begins; tokens that split a character are merged."""
        groups: list[tuple[int, ...]] = []
        for token in ids:
            # Only parts of a character complete a character.
            broken = groups and _BROKEN in self.texts[token] and _BROKEN in self._text(groups[-1])
            if broken and len(groups[-1]) < _LONGEST:
                groups[-1] = (*groups[-1], token)
            else:
                groups.append((token,))
        starts = [0, *accumulate(len(group) for group in groups)]
        return [self._text(group) for group in groups], starts[:-1]

    def _text(self, ids: tuple[int, ...]) -> str:
        if len(ids) == 1:
            return self.texts[ids[0]]
        if ids not in self._joined:
            self._joined[ids] = self._decoded(ids)
        return self._joined[ids]

    def _decoded(self, ids: tuple[int, ...]) -> str:
        text: str = self._tokenizer.decode([*self._before, *ids], skip_special_tokens=False)
        return text[self._skip :]


@torch.inference_mode()
def output_tokens(folder: Path, directions: Tensor, words: TokenTexts) -> list[tuple[str, ...]]:
    """For each of `directions [K, d_model]` the tokens whose logits it raises most, whole characters only.

    None for a direction of zeros.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report every layer that is left out
    logging.disable_progress_bar()
    try:
        # Without layers, a model is its last norm and its unembedding.
        head: Any = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=0, dtype=torch.float32).eval()
    finally:
        logging.set_verbosity(level)
    result: list[tuple[str, ...]] = []
    for part in directions.float().split(_BATCH):
        logits = head(inputs_embeds=part[:, None, :], use_cache=False).logits[:, 0]  # [k, V]
        for best, direction in zip(logits.topk(4 * _OUTPUTS, dim=1).indices.tolist(), part, strict=True):
            if not direction.any():  # rows that were narrowed have no decoder
                result.append(())
                continue
            texts = [words.texts[i] for i in best if i < len(words.texts)]
            result.append(tuple(text for text in texts if text.strip() and _BROKEN not in text)[:_OUTPUTS])
    return result
