"""The texts that evidence is cut from, as harvested shards hold them: token ids, and where their activations stand."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from guard.errors import InvalidInput
from guard.lab import shards
from guard.lab.heads.features import Ints
from guard.lab.labelled import DOMAINS, Row

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Pieces:
    """P texts, each once, and their T tokens; shards are numbered through all folders.

    Memory: 16 bytes a token, once `holding` has been asked.
    """

    files: tuple[tuple[Path, int], ...]  # folder and index of each shard
    ids: NDArray[np.int32]  # [T]
    start: Ints  # [P + 1] where each text begins in `ids`
    shard: Ints  # [P] which of `files` holds it
    offset: Ints  # [P] its first token there
    own: Bools  # [P] the project's own, or a corpus's
    domains: Bools  # [P, domains] what an own text is labelled with

    def __len__(self) -> int:
        return len(self.shard)

    def tokens(self, piece: int) -> NDArray[np.int32]:
        return self.ids[self.start[piece] : self.start[piece + 1]]

    def activations(self, number: int, hook_point: str) -> Tensor:
        """`[tokens of the shard, d_model]` bfloat16, of one hook point alone: a shard may hold many."""
        with safe_open(shards.path(*self.files[number]), "pt") as shard:
            result: Tensor = shard.get_tensor(hook_point)
        return result

    def holding(self, ids: Sequence[int]) -> tuple[Ints, Ints]:
        """The texts that hold one of these tokens, and where in the text it first stands."""
        order, ranked = self._by_id
        parts = [order[np.searchsorted(ranked, i) : np.searchsorted(ranked, i, side="right")] for i in ids]
        places = np.sort(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)
        found, first = np.unique(np.searchsorted(self.start, places, side="right") - 1, return_index=True)
        return found, places[first] - self.start[found]

    @cached_property
    def _by_id(self) -> tuple[Ints, NDArray[np.int32]]:
        order = np.argsort(self.ids, kind="stable")
        return order, self.ids[order]


def read_pieces(texts: Path, rows: Sequence[Row], corpus: Path | None = None, corpus_shards: int = 0) -> Pieces:
    """The project's own texts of `texts`, and all of `corpus_shards` shards, spread evenly, of `corpus`.

    Only token ids are read. Raises InvalidInput for shards that hold none, and where there is no own text.
    """
    own = np.array([row.own for row in rows])
    labels = np.array([[domain in row.label_domains for domain in DOMAINS] for row in rows])
    files = [(texts, index) for index in range(shards.described(texts).shard_count)]
    if corpus is not None:
        there = shards.described(corpus).shard_count
        files += [(corpus, i) for i in sorted(set(np.linspace(0, there - 1, min(corpus_shards, there)).astype(int)))]
    seen: set[bytes] = set()
    ids, columns = [], []
    for number, (folder, index) in enumerate(files):
        for text, offset, tokens in _texts(folder, index):
            is_own = folder == texts
            if (is_own and not own[text]) or (key := tokens.tobytes()) in seen:
                continue
            seen.add(key)
            ids.append(tokens)
            columns.append((number, offset, is_own, *(labels[text] if is_own else [False] * len(DOMAINS))))
    if not ids:
        raise InvalidInput(
            f"{texts}: found none of the project's own texts; harvest with `guard lab harvest --labelled`"
        )
    table = np.array(columns, dtype=np.int64)
    return Pieces(
        files=tuple(files),
        ids=np.concatenate(ids),
        start=np.cumsum([0, *map(len, ids)]),
        shard=table[:, 0],
        offset=table[:, 1],
        own=table[:, 2] > 0,
        domains=table[:, 3:] > 0,
    )


def _texts(folder: Path, index: int) -> Iterator[tuple[int, int, NDArray[np.int32]]]:
    """Number, first token and token ids of every text of a shard."""
    file = shards.path(folder, index)
    if not file.exists():
        raise InvalidInput(f"{file}: absent; the harvest is not complete, run `guard lab harvest` again")
    with safe_open(file, "np") as shard:
        if "token" not in shard.keys():  # noqa: SIM118 - not a mapping, keys() is all it has
            raise InvalidInput(f"{file}: holds no token ids; harvest again")
        ids, piece = shard.get_tensor("token"), shard.get_tensor("piece")
    bounds = [0, *(np.flatnonzero(np.diff(piece)) + 1).tolist(), len(piece)]
    for begin, end in pairwise(bounds):
        yield int(piece[begin]), begin, ids[begin:end]
