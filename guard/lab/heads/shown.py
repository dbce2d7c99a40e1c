"""What the project's own texts show of a latent: the tokens that it likes, and the texts in which it fires most."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from guard.lab import shards
from guard.lab.heads.features import Floats, Ints
from guard.lab.labelled import Row
from guard.lab.suite.sae import FullSae
from guard.pack.manifest import ExampleLine
from guard.reader.tokens import TextTokenizer

EXAMPLES = 6
TOP_TOKENS = 8
BEFORE, BEHIND = 240, 120  # characters of an example, at most, around the token that it shows


@dataclass(frozen=True)
class _Tokens:
    """The own tokens of a shard."""

    place: Ints  # [T] in the shard
    text: Ints  # [T] number of the text
    position: Ints  # [T] within the text
    word: Ints  # [T] number of the word, blanks and capitals aside


@torch.no_grad()
def shown(
    suite: Sequence[FullSae],
    rows: NDArray[np.int64],
    scale: Floats,
    texts: Sequence[Row],
    folder: Path,
    tokenizer: TextTokenizer,
) -> tuple[list[tuple[str, ...]], list[tuple[ExampleLine, ...]]]:
    """Top tokens and examples of each of `rows`, latents numbered through the suite; `scale` is of the whole suite.

    Memory: 20 bytes a firing of a shard, and `EXAMPLES` firings a latent.
    """
    own = {number: tokenizer.text(row.text).spans for number, row in enumerate(texts) if row.own}
    words: dict[str, int] = {}
    numbers = {
        number: [words.setdefault(plain(texts[number].text[start:end]), len(words)) for start, end in spans]
        for number, spans in own.items()
    }
    frequency = np.bincount(np.concatenate([np.array(w, dtype=np.int64) for w in numbers.values()]))
    mass = np.zeros((len(rows), len(words)), dtype=np.float32)
    best = np.zeros((0, 4))  # row, strength, text, position of the strongest firings, one a text
    for index in range(shards.described(folder).shard_count):
        shard = shards.load(folder, index)
        tokens = _own_tokens(shard["piece"].numpy(), numbers)
        if len(tokens.place):
            row, token, strength = _firings(suite, rows, scale, shard, tokens.place)
            np.add.at(mass, (row, tokens.word[token]), strength)
            fresh = np.stack([row, strength, tokens.text[token], tokens.position[token]], axis=1)
            best = _strongest(np.concatenate([best, fresh]))
    names = list(words)
    likes = mass / np.sqrt(frequency + 1.0)  # how much of the activation a word holds, for how often it occurs at all
    likes[:, [not name for name in names]] = 0.0
    top = [tuple(names[i] for i in np.argsort(-line, kind="stable")[:TOP_TOKENS] if line[i] > 0) for line in likes]
    examples: list[list[ExampleLine]] = [[] for _ in rows]
    for row, strength, text, position in best:
        start, end = own[int(text)][int(position)]
        examples[int(row)].append(excerpt(texts[int(text)].text, start, end, round(float(strength), 3)))
    return top, [tuple(lines) for lines in examples]


def excerpt(text: str, start: int, end: int, activation: float) -> ExampleLine:
    """The token at `start` to `end` of the text amid what stands near it, from blank to blank if there are any."""
    first, last = max(start - BEFORE, 0), min(end + BEHIND, len(text))
    if first:
        first = text.find(" ", first, start) + 1 or first
    if last < len(text):
        last = max(text.rfind(" ", end, last), 0) or last
    return ExampleLine(text=text[first:last], start=start - first, end=end - first, activation=activation)


def plain(token: str) -> str:
    return token.strip().lower()


def _own_tokens(piece: NDArray[np.int32], numbers: dict[int, list[int]]) -> _Tokens:
    place = np.flatnonzero(np.isin(piece, list(numbers)))
    text = piece[place].astype(np.int64)
    position = place - np.searchsorted(piece, text)  # pieces are sorted
    word = np.array([numbers[t][p] for t, p in zip(text.tolist(), position.tolist(), strict=True)], dtype=np.int64)
    return _Tokens(place, text, position, word)


def _firings(
    suite: Sequence[FullSae], rows: NDArray[np.int64], scale: Floats, shard: dict[str, torch.Tensor], place: Ints
) -> tuple[Ints, Ints, Floats]:
    """Row (its place among `rows`), token and strength, in units of the latent's scale, of everything that fires."""
    found: list[tuple[Ints, Ints, Floats]] = []
    offset = before = 0
    for sae in suite:
        local = rows[(rows >= offset) & (rows < offset + sae.width)] - offset
        picked = torch.from_numpy(local)
        x = shard[sae.hook_point][torch.from_numpy(place)].float()
        pre = torch.addmm(sae.bias[picked], x, sae.enc_rows[picked].T)  # [T, k]
        token, column = (t.numpy() for t in (pre > sae.threshold[picked]).nonzero(as_tuple=True))
        found.append((column + before, token, pre.numpy()[token, column] / scale[offset + local[column]]))
        offset, before = offset + sae.width, before + len(local)
    row, token, strength = (np.concatenate(part) for part in zip(*found, strict=True))
    return row, token, strength


def _strongest(firings: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row the `EXAMPLES` strongest, one of each text, strongest first."""
    ordered = firings[np.lexsort((firings[:, 3], -firings[:, 1], firings[:, 2], firings[:, 0]))]
    first = np.r_[True, (ordered[1:, [0, 2]] != ordered[:-1, [0, 2]]).any(axis=1)]  # of each row and text
    ordered = ordered[first]
    ordered = ordered[np.lexsort((ordered[:, 2], -ordered[:, 1], ordered[:, 0]))]
    rank = np.arange(len(ordered)) - np.searchsorted(ordered[:, 0], ordered[:, 0])
    return ordered[rank < EXAMPLES]
