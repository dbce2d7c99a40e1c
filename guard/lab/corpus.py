"""Plain-text corpora: gzip or text files, documents separated by three newlines."""

import gzip
import io
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from guard.errors import InvalidInput

_SEPARATOR = "\n\n\n"


def documents(file: Path) -> list[str]:
    if not file.exists():
        raise InvalidInput(f"corpus {file}: found no such file")
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
        whole = io.TextIOWrapper(stream, encoding="utf-8").read()
    return [text for part in whole.split(_SEPARATOR) if (text := part.strip())]


def sample_pieces(
    files: Sequence[Path],
    tokenize: Callable[[str], list[int]],
    *,
    tokens: int,
    context: int,
    seed: int,
    shortest: int = 16,
) -> list[list[int]]:
    """About `tokens` tokens in pieces of at most `context`, an equal share from every file, shuffled by `seed`.

    A file too small for its share gives all it has, and the others make up for it.
    """
    rng = random.Random(seed)
    streams = {file: _pieces(file, tokenize, context, shortest, rng) for file in sorted(files)}
    taken: dict[Path, int] = dict.fromkeys(streams, 0)
    result: list[list[int]] = []
    while streams and sum(taken.values()) < tokens:
        poorest = min(streams, key=lambda file: taken[file])
        piece = next(streams[poorest], None)
        if piece is None:
            del streams[poorest]
            continue
        taken[poorest] += len(piece)
        result.append(piece)
    rng.shuffle(result)
    return result


def _pieces(
    file: Path, tokenize: Callable[[str], list[int]], context: int, shortest: int, rng: random.Random
) -> Iterator[list[int]]:
    texts = documents(file)
    rng.shuffle(texts)
    for text in texts:
        ids = tokenize(text)
        for start in range(0, len(ids), context):
            if len(piece := ids[start : start + context]) >= shortest:
                yield piece
