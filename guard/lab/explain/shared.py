"""Shared texts: what every latent of a prompt does on the others' test windows too, so that few texts serve them all.

Evidence tells of a latent's own windows alone. Here each is found again in the harvested texts that it was cut from,
and all latents of the batch are read there. A latent is not tested on a text of which its explainer has seen a stretch.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from guard.errors import InvalidInput
from guard.lab import shards
from guard.lab.explain.pieces import Pieces, read_pieces
from guard.lab.explain.records import Window
from guard.lab.explain.scan import Reading
from guard.lab.explain.sheets import Subject, Tokens
from guard.lab.explain.tokens import TokenTexts
from guard.lab.heads.features import Floats
from guard.lab.stages import read_rows, statistics
from guard.lab.suite.sae import FullSae, load_suite
from guard.reader import weights

Batch = tuple[Subject, ...]

_KEY = 4  # tokens that a window is looked up by
_SAME = 0.01  # strengths that differ by less are equal: evidence rounds them


@dataclass(frozen=True)
class Place:
    """A stretch of a text: ids `begins[0]` to `stop`, and where each token of the window begins among them."""

    piece: int
    begins: tuple[int, ...]
    stop: int


@dataclass(frozen=True)
class Source:
    """Where evidence was cut from: the same folders and numbers that `guard lab explain` was given."""

    saes: Path
    texts: Path
    corpus: Path | None = None
    corpus_shards: int = 0


def share(
    batches: Sequence[Batch], source: Source, progress: Callable[[int, int], None] = lambda _done, _all: None
) -> list[Batch]:
    """The same batches, each latent with its truth on all test windows of its batch.

    Raises InvalidInput where a window is not found again, or its latent fires otherwise there.
    """
    pieces = read_pieces(source.texts, read_rows(source.texts), source.corpus, source.corpus_shards)
    words = TokenTexts(weights.resolve(shards.described(source.texts).model))
    everywhere = find({w.tokens for b in batches for s in b for w in (*s.windows, *s.shown)}, pieces, words)
    suite = {sae.name: sae for sae in load_suite(source.saes, {s.explanation.sae for b in batches for s in b})}
    scale = {name: statistics(sae, source.saes).scale for name, sae in suite.items()}
    readers = [_Readers(batch, suite, scale) for batch in batches]
    by_shard: dict[int, list[tuple[int, Tokens, Place]]] = defaultdict(list)
    for number, batch in enumerate(batches):
        for tokens in dict.fromkeys(w.tokens for s in batch for w in s.windows):
            if not everywhere[tokens]:
                raise InvalidInput(f"{source.texts}: found no text with {''.join(tokens)!r:.60}, which evidence shows")
            for place in everywhere[tokens]:
                by_shard[int(pieces.shard[place.piece])].append((number, tokens, place))
    seen: dict[tuple[int, Tokens], list[tuple[Place, Floats]]] = defaultdict(list)
    for done, number in enumerate(sorted(by_shard), 1):
        shard = shards.load(*pieces.files[number])
        for which, tokens, place in by_shard[number]:
            seen[which, tokens].append((place, readers[which].strengths(shard, place, pieces)))
        progress(done, len(by_shard))
    return [_with_truth(number, batch, seen, everywhere) for number, batch in enumerate(batches)]


def find(wanted: set[Tokens], pieces: Pieces, words: TokenTexts) -> dict[Tokens, list[Place]]:
    """Every place of each window; most have one."""
    by_start: dict[Tokens, list[Tokens]] = defaultdict(list)
    for tokens in wanted:
        by_start[tokens[:_KEY]].append(tokens)
    lengths = sorted({len(key) for key in by_start})  # a window may be shorter than a key
    result: dict[Tokens, list[Place]] = {tokens: [] for tokens in wanted}
    for piece in range(len(pieces)):
        ids = pieces.tokens(piece).tolist()
        texts, begins = words.split(ids)
        ends = [*begins[1:], len(ids)]
        for at in range(len(texts)):
            for length in lengths:
                for tokens in by_start.get(tuple(texts[at : at + length]), ()):
                    last = at + len(tokens)
                    if tuple(texts[at:last]) == tokens:
                        result[tokens].append(Place(piece, tuple(begins[at:last]), ends[last - 1]))
    return result


class _Readers:
    """The latents of a batch, whatever their SAEs, read together."""

    def __init__(self, batch: Batch, suite: Mapping[str, FullSae], scale: Mapping[str, Floats]) -> None:
        columns: dict[str, list[int]] = defaultdict(list)
        for column, subject in enumerate(batch):
            columns[subject.explanation.sae].append(column)
        self._width = len(batch)
        self._parts = []
        for name, mine in columns.items():
            latents = np.array([batch[column].explanation.number for column in mine])
            self._parts.append((mine, Reading(suite[name], latents), scale[name][latents]))

    @torch.no_grad()
    def strengths(self, shard: Mapping[str, torch.Tensor], place: Place, pieces: Pieces) -> Floats:
        """`[tokens of the window, latents]`."""
        first = int(pieces.offset[place.piece])
        inside = np.array(place.begins) - place.begins[0]
        result = np.zeros((len(inside), self._width), dtype=np.float32)
        for columns, reading, scale in self._parts:
            x = shard[reading.hook_point][first + place.begins[0] : first + place.stop]
            active = reading.activations(x, torch.arange(len(columns)))  # [T, n]
            result[:, columns] = np.maximum.reduceat(active.numpy() / scale, inside, axis=0)
        return result


def _with_truth(
    number: int,
    batch: Batch,
    seen: dict[tuple[int, Tokens], list[tuple[Place, Floats]]],
    everywhere: dict[Tokens, list[Place]],
) -> Batch:
    windows: list[list[Window]] = [[] for _ in batch]
    for owner, subject in enumerate(batch):
        for window in subject.windows:
            place, values = min(
                seen[number, window.tokens], key=lambda found: _difference(found[1][:, owner], window.values)
            )
            if _difference(values[:, owner], window.values) > _SAME:
                raise InvalidInput(
                    f"{subject.explanation.latent}: fires otherwise on {window.text!r:.60} than evidence says; "
                    "expected the SAEs and texts that it was cut from"
                )
            windows[owner].append(window)
            for column, other in enumerate(batch):
                known = any(own.tokens == window.tokens for own in other.windows)
                if not known and not _was_shown(other, place.piece, everywhere):
                    windows[column].append(_window(window, values[:, column]))
    return tuple(replace(s, windows=tuple(own)) for s, own in zip(batch, windows, strict=True))


def _difference(values: NDArray[np.float32], expected: Sequence[float]) -> float:
    return float(np.abs(values - np.array(expected)).max(initial=0.0))


def _was_shown(subject: Subject, piece: int, everywhere: dict[Tokens, list[Place]]) -> bool:
    return any(place.piece == piece for window in subject.shown for place in everywhere[window.tokens])


def _window(window: Window, values: NDArray[np.float32]) -> Window:
    fires = bool((values > 0).any())
    return window.model_copy(update={"kind": "middle" if fires else "silent", "values": tuple(values.tolist())})
