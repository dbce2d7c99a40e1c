"""Harvest: a corpus goes through the model once, and its activations at the hook points go to disk.

Every piece of text stands behind the sink token, or where a chat's template puts it. What stands before it is read, and
not kept: the sink's outsized norm would rule the loss of an SAE, and Guard scores neither it nor a template.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from guard.errors import InvalidInput
from guard.lab import shards
from guard.lab.corpus import sample_pieces
from guard.reader import weights
from guard.reader.model import TorchReader, pick_dtype
from guard.reader.tokens import TextTokenizer
from guard.records import Message, Role

Progress = Callable[[int, int], None]  # tokens done, tokens in all

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Piece:
    """The ids of a piece of text, and those that are read before it."""

    before: Sequence[int]
    ids: list[int]


def harvest(
    *,
    model: str,
    corpus: Sequence[Path],
    hook_points: Sequence[str],
    out: Path,
    tokens: int,
    context: int = 256,
    shard_tokens: int = 1 << 15,
    dtype: str = "auto",
    seed: int = 0,
    shares: Mapping[str, float] | None = None,
    progress: Progress = lambda _done, _all: None,
) -> shards.ShardSet:
    """Writes `out/shard-*.safetensors`; shards that are there already are kept, so a killed run goes on.

    `context` counts the sink token; `shares` weighs the files of the corpus by name (see `sample_pieces`).
    Raises InvalidInput where `out` holds shards of another harvest, and for a share that fits no file.
    """
    folder = weights.resolve(model)
    tokenizer = TextTokenizer(folder)
    pieces = sample_pieces(
        corpus, lambda text: tokenizer.text(text).ids, tokens=tokens, context=context - 1, seed=seed, shares=shares
    )
    given = {file.name: 1.0 for file in corpus} | dict(shares or {})
    sources = tuple(name if w == 1 else f"{name} x{w:g}" for name, w in sorted(given.items()))
    bare = [Piece((tokenizer.sink_id,), ids) for ids in pieces]
    return _write(model, folder, bare, sources, hook_points, out, context, shard_tokens, dtype, seed, progress)


def harvest_texts(
    *,
    model: str,
    texts: Sequence[str],
    before: Sequence[Sequence[Message]] = (),
    sources: tuple[str, ...],
    hook_points: Sequence[str],
    out: Path,
    context: int = 256,
    shard_tokens: int = 1 << 15,
    dtype: str = "auto",
    progress: Progress = lambda _done, _all: None,
) -> shards.ShardSet:
    """Like `harvest`, for given texts in their order: `piece` is a text's index. Texts are cut at `context` tokens.

    `before`, where given: for each text the messages of a chat that it follows, as the answer to them; or as the first
    user message, where there are none.
    """
    folder = weights.resolve(model)
    tokenizer = TextTokenizer(folder)
    openings = {said: _opening(tokenizer, said) for said in {tuple(messages) for messages in before}}
    pieces = [
        Piece(openings[tuple(before[i])] if before else (tokenizer.sink_id,), tokenizer.text(text).ids[: context - 1])
        for i, text in enumerate(texts)
    ]
    return _write(model, folder, pieces, sources, hook_points, out, context, shard_tokens, dtype, 0, progress)


def _opening(tokenizer: TextTokenizer, said: tuple[Message, ...]) -> list[int]:
    """What the template puts before the first user message; or before the answer to what was `said`."""
    if said:
        return [number for piece in tokenizer.chat(said, open_reply=True) for number in piece.ids]
    return tokenizer.chat([Message(Role.USER, "")], open_reply=False)[0].ids


def _write(
    model: str,
    folder: Path,
    pieces: Sequence[Piece],
    sources: tuple[str, ...],
    hook_points: Sequence[str],
    out: Path,
    context: int,
    shard_tokens: int,
    dtype: str,
    seed: int,
    progress: Progress,
) -> shards.ShardSet:
    if not pieces:
        raise InvalidInput("the corpus holds no text long enough to read")
    plan = _plan(pieces, shard_tokens)
    reader = TorchReader(folder, hook_points, dtype=pick_dtype(dtype))
    total = sum(len(piece.ids) for piece in pieces)
    made = shards.ShardSet(
        model=model,
        fingerprint=weights.fingerprint(folder),
        hook_points=tuple(hook_points),
        d_model=reader.d_model,
        dtype=str(reader.dtype).removeprefix("torch."),
        context=context,
        seed=seed,
        tokens=total,
        sources=sources,
        shard_count=len(plan),
        shard_tokens=shard_tokens,
        planned=_digest(pieces),
    )
    shards.describe(out, made)
    done = 0
    for index, chosen in enumerate(plan):
        if not shards.path(out, index).exists():
            shards.write(out, index, _read_shard(reader, pieces, chosen))
        done += sum(len(pieces[i].ids) for i in chosen)
        progress(done, total)
    return made


def _digest(pieces: Sequence[Piece]) -> str:
    found = hashlib.sha256()
    for piece in pieces:
        for ids in (piece.before, piece.ids):
            found.update(np.array([len(ids), *ids], dtype=np.int32).tobytes())
    return found.hexdigest()


def _plan(pieces: Sequence[Piece], shard_tokens: int) -> list[list[int]]:
    """Which pieces stand in which shard."""
    plan: list[list[int]] = [[]]
    size = 0
    for index, piece in enumerate(pieces):
        if size >= shard_tokens:
            plan.append([])
            size = 0
        plan[-1].append(index)
        size += len(piece.ids)
    return plan


def _read_shard(reader: TorchReader, pieces: Sequence[Piece], chosen: Sequence[int]) -> dict[str, Tensor]:
    kept: dict[int, dict[str, Tensor]] = {}
    whole = {i: [*pieces[i].before, *pieces[i].ids] for i in chosen}
    for batch in by_length([len(whole[i]) for i in chosen], _BATCH_TOKENS):
        rows = reader.read([whole[chosen[place]] for place in batch])
        for place, seen in zip(batch, rows, strict=True):
            i = chosen[place]
            kept[i] = {point: x[len(pieces[i].before) :].to(torch.bfloat16) for point, x in seen.items()}
    result = {point: torch.cat([kept[i][point] for i in chosen]) for point in reader.hook_points}
    result["token"] = torch.cat([torch.tensor(pieces[i].ids, dtype=torch.int32) for i in chosen])
    result["piece"] = torch.cat([torch.full((len(pieces[i].ids),), i, dtype=torch.int32) for i in chosen])
    return result


def by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices grouped so that sequences of like length share a batch of at most `batch_tokens` padded tokens."""
    batches: list[list[int]] = []
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            batches.append(batch)
            batch = []
        batch.append(index)
    return [*batches, batch] if batch else batches
