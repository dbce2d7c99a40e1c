"""Evidence: for each latent, short windows of text that show where it fires, where it nearly does, and where not."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from guard.lab.explain.choose import SAMPLE, WANTED, Chosen, choose
from guard.lab.explain.pieces import Pieces
from guard.lab.explain.records import Evidence, Window
from guard.lab.explain.scan import Reading, scan
from guard.lab.explain.tokens import TokenTexts, output_tokens
from guard.lab.heads.features import Floats, Ints, LatentStats
from guard.lab.suite.sae import FullSae
from guard.records import LatentId

VERSION = "windows-1"  # of which windows are chosen, and how they are cut

_LONGEST = 48  # tokens of a window
_AFTER = 16  # of them behind the peak: the model had not read these when it fired


@dataclass(frozen=True)
class Wanted:
    """Latents of one SAE."""

    sae: FullSae
    stats: LatentStats
    latents: Ints  # [C]
    domains: tuple[tuple[str, ...], ...]  # what each is tagged with


@dataclass
class _Cut:
    """A window, and once its text is read, what the latent does there."""

    wanted: int
    column: int  # of the latent, among those wanted of its SAE
    chosen: Chosen
    tokens: list[str]
    starts: Ints  # where each of them begins in the text
    stop: int
    values: Floats | None = None

    @property
    def piece(self) -> int:
        return self.chosen.place.piece


def gather(
    wanted: Sequence[Wanted],
    pieces: Pieces,
    folder: Path,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Iterator[Evidence]:
    """Evidence of all latents in their order; one that fires in no text has no `top` and no `middle` windows.

    Shards are read twice, one at a time, whatever the number of latents; `folder` holds the model that read them.
    Memory: one hook point of one shard, a block of 64 MB, what Pieces and Scan say, the unembedding, and 42 windows of
    about 1 kB for each latent. 4,500 latents over 900 texts: 18 s of one core and 0.7 GB.
    """
    words = TokenTexts(folder)
    readings = [Reading(w.sae, w.latents) for w in wanted]
    steps = 2 * len(pieces.files)
    scans = scan(
        pieces,
        readings,
        top=WANTED["top"],
        sample=SAMPLE,
        near=WANTED["near_miss"],
        seed=seed,
        progress=lambda done, _all: progress(done, steps),
    )
    split = lru_cache(maxsize=4096)(lambda piece: words.split(pieces.tokens(piece).tolist()))
    cuts = []
    for number, (w, found) in enumerate(zip(wanted, scans, strict=True)):
        for column, latent in enumerate(w.latents.tolist()):
            rng = np.random.default_rng([seed, latent])
            for chosen in choose(column, w.domains[column], found, pieces, words, rng):
                piece, token = chosen.place
                texts, begins = split(piece)
                window = _around(token, begins)
                stop = [*begins, len(pieces.tokens(piece))][window.stop]
                cuts.append(_Cut(number, column, chosen, texts[window], np.array(begins[window]), stop))
    _read(cuts, wanted, readings, pieces, lambda done: progress(len(pieces.files) + done, steps))
    outputs = [output_tokens(folder, w.sae.dec_rows[torch.from_numpy(w.latents)], words) for w in wanted]
    by_latent = {key: list(its) for key, its in groupby(cuts, key=lambda cut: (cut.wanted, cut.column))}
    for number, w in enumerate(wanted):
        for column, latent in enumerate(w.latents.tolist()):
            yield Evidence(
                latent=str(LatentId(w.sae.hook_point, latent)),
                sae=w.sae.name,
                firing_rate=float(w.stats.firing_rate[latent]),
                output_tokens=outputs[number][column],
                windows=tuple(_window(cut, pieces) for cut in by_latent.get((number, column), [])),
            )


def _around(token: int, begins: Sequence[int]) -> slice:
    """Which of a text's tokens stand in a window laid around one of its ids; `begins`: the first id of each."""
    peak = bisect_right(begins, token) - 1
    first = max(0, min(peak - (_LONGEST - 1 - _AFTER), len(begins) - _LONGEST))
    return slice(first, min(first + _LONGEST, len(begins)))


@torch.no_grad()
def _read(
    cuts: Sequence[_Cut],
    wanted: Sequence[Wanted],
    readings: Sequence[Reading],
    pieces: Pieces,
    progress: Callable[[int], None],
) -> None:
    """Fills in the values, text by text: latents that share a text are read together."""
    in_order = sorted(cuts, key=lambda cut: (pieces.shard[cut.piece], cut.wanted, cut.piece))
    for (number, which), in_shard in groupby(in_order, key=lambda cut: (int(pieces.shard[cut.piece]), cut.wanted)):
        reading, w = readings[which], wanted[which]
        x = pieces.activations(number, reading.hook_point)
        for piece, group in groupby(in_shard, key=lambda cut: cut.piece):
            here = list(group)
            columns = torch.tensor([cut.column for cut in here])
            begin = int(pieces.offset[piece])
            acts = reading.activations(x[begin : begin + len(pieces.tokens(piece))], columns)
            strength = acts.numpy() / w.stats.scale[w.latents[columns.numpy()]]  # [T, n]
            for cut, values in zip(here, strength.T, strict=True):
                cut.values = np.maximum.reduceat(values[: cut.stop], cut.starts)
        progress(number + 1)


def _window(cut: _Cut, pieces: Pieces) -> Window:
    values = [] if cut.values is None else cut.values.tolist()
    return Window(
        kind=cut.chosen.kind,
        part=cut.chosen.part,
        source="own" if pieces.own[cut.piece] else "corpus",
        tokens=tuple(cut.tokens),
        values=tuple(max(round(v, 3), 0.001) if v > 0 else 0.0 for v in values),  # what fires stays above 0
    )
