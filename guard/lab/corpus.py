"""Plain-text corpora: gzip or text files, documents separated by three newlines."""

import gzip
import io
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from guard.errors import InvalidInput

_SEPARATOR = "\n\n\n"


def documents(file: Path) -> list[str]:
    if not file.exists():
        raise InvalidInput(f"corpus {file}: found no such file")
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            whole = io.TextIOWrapper(stream, encoding="utf-8").read()
    except (EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
        raise InvalidInput(f"corpus {file}: {error}; expected UTF-8 text, compressed where it ends in .gz") from None
    return [text for part in whole.split(_SEPARATOR) if (text := part.strip())]


def sample_pieces(
    files: Sequence[Path],
    tokenize: Callable[[str], list[int]],
    *,
    tokens: int,
    context: int,
    seed: int,
    shortest: int = 16,
    shares: Mapping[str, float] | None = None,
) -> list[list[int]]:
    """About `tokens` tokens in pieces of at most `context`, an equal share from every file, shuffled by `seed`.

    `shares` weighs files by name; those it does not name weigh 1. A file too small for its share gives all it has, and
    the others make up for it. Raises InvalidInput for a name that is no file's, and for a weight that is not positive.
    """
    weight = {file.name: 1.0 for file in files} | dict(shares or {})
    if strangers := set(weight) - {file.name for file in files}:
        raise InvalidInput(f"share of {', '.join(sorted(strangers))}: the corpus holds no such file")
    if wrong := [name for name, w in weight.items() if not w > 0]:
        raise InvalidInput(f"share of {wrong[0]}: found {weight[wrong[0]]:g}, expected a number above 0")
    rng = random.Random(seed)
    streams = {file: _pieces(file, tokenize, context, shortest, rng) for file in sorted(files)}
    taken: dict[Path, float] = dict.fromkeys(streams, 0.0)
    total = 0
    result: list[list[int]] = []
    while streams and total < tokens:
        poorest = min(streams, key=lambda file: taken[file])
        piece = next(streams[poorest], None)
        if piece is None:
            del streams[poorest]
            continue
        taken[poorest] += len(piece) / weight[poorest.name]
        total += len(piece)
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
