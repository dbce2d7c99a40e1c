"""Texts as the heads see them: for each text, the mean activation and every latent's mean strength.

`guard lab harvest --labelled` has read the texts; this module encodes what it kept with whole SAEs, and pools.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.kernels.contract import rms_normalised
from guard.lab import shards
from guard.lab.suite.sae import FullSae

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
_BLOCK = 4096
_QUANTILES = (0.5, 0.9, 0.99)
STATISTICS_SHARDS = 10  # of a corpus, for firing rates and scales
_MOST_HITS = 1 << 25  # half a GB of them


@dataclass(frozen=True)
class LatentStats:
    """Of every latent of an SAE, or of a suite one SAE after the other, over a corpus."""

    firing_rate: Floats  # [K] share of tokens
    scale: Floats  # [K] what counts as a strong activation, above the threshold
    quantiles: dict[str, Floats]  # of the activations that are not zero

    @staticmethod
    def joined(parts: Sequence["LatentStats"]) -> "LatentStats":
        return LatentStats(
            np.concatenate([p.firing_rate for p in parts]),
            np.concatenate([p.scale for p in parts]),
            {name: np.concatenate([p.quantiles[name] for p in parts]) for name in parts[0].quantiles},
        )


@dataclass(frozen=True)
class PooledTexts:
    tokens: Ints  # [N]
    mean: Floats  # [N, hook points * d_model] of RMS-normalised activations, as probes read them
    strength: NDArray[np.float16]  # [N, A] mean over the tokens (see guard.scoring.pooling.Gate); 0 where none fired

    @staticmethod
    def joined(parts: Sequence["PooledTexts"]) -> "PooledTexts":
        return PooledTexts(
            np.concatenate([p.tokens for p in parts]),
            np.concatenate([p.mean for p in parts]),
            np.concatenate([p.strength for p in parts]),
        )


@torch.no_grad()
def latent_stats(
    sae: FullSae,
    activations: Path,
    *,
    shard_count: int = STATISTICS_SHARDS,
    quantile: float = 0.95,
    most_hits: int = _MOST_HITS,
) -> LatentStats:
    """Firing rates and scales over the first shards of a harvest; over fewer once latents fired `most_hits` times.

    The scale lies above the threshold by a high quantile of what a latent's own firings exceed it, so that one outlier
    does not set it, and by half the median of its SAE at least: one that hardly ever fired would otherwise be divided
    by next to nothing. Memory: 16 bytes a hit.
    """
    parts: list[NDArray[np.int64]] = []
    tokens = 0
    for index in range(min(shard_count, shards.described(activations).shard_count)):
        x_all = shards.load(activations, index)[sae.hook_point]
        parts += [_hits(sae, x) for x in x_all.split(_BLOCK)]
        tokens += len(x_all)
        if sum(map(len, parts)) >= most_hits:
            break
    hits = np.concatenate(parts)
    del parts
    hits.sort()
    ends = np.searchsorted(hits, np.arange(sae.width + 1) << 32)
    starts, counts = ends[:-1], np.diff(ends)
    excess = hits.astype(np.uint32).view(np.float32)  # the lower half
    alive = counts > 0

    def at(q: float) -> Floats:
        """Of what each latent's firings exceed its threshold by; 0 where it never fired."""
        place = starts + np.floor(q * np.maximum(counts - 1, 0)).astype(np.int64)
        return np.where(alive, excess[np.minimum(place, len(excess) - 1)], 0.0).astype(np.float32)

    threshold = sae.threshold.numpy()
    high = at(quantile)
    floor = 0.5 * float(np.median(high[alive]))
    return LatentStats(
        firing_rate=(counts / tokens).astype(np.float32),
        scale=(threshold + np.maximum(high, floor)).astype(np.float32),
        quantiles={str(q): np.where(alive, threshold + at(q), 0.0).astype(np.float32) for q in _QUANTILES},
    )


def _hits(sae: FullSae, x: Tensor) -> NDArray[np.int64]:
    """One number a firing: the latent above, and below it the bits of what it exceeds its threshold by.

    Positive floats are ordered as their bits are, so that one plain sort orders all by latent and then by strength.
    """
    acts = sae.encode(x)
    token, latent = acts.nonzero(as_tuple=True)
    excess = acts[token, latent] - sae.threshold[latent]
    return latent.numpy() << 32 | excess.numpy().view(np.uint32)


def means(texts: Path, hook_points: Sequence[str]) -> tuple[Ints, dict[str, Floats]]:
    """Tokens of every text `[N]`, and at each hook point the mean of its RMS-normalised activations `[N, d_model]`."""
    described = shards.described(texts)
    count = text_count(texts)
    tokens = np.zeros(count, dtype=np.int64)
    result = {point: np.zeros((count, described.d_model), dtype=np.float32) for point in hook_points}
    for shard, piece, span in by_text(texts):
        size = torch.bincount(piece, minlength=span.stop - span.start).clamp(min=1)
        tokens[span] = size.numpy()
        for point in hook_points:
            x = rms_normalised(shard[point].float())
            sums = torch.zeros(span.stop - span.start, x.shape[1]).index_add_(0, piece, x)
            result[point][span] = (sums / size[:, None]).numpy()
    return tokens, result


@torch.no_grad()
def pool(
    suite: Sequence[FullSae],
    scales: Sequence[Floats],
    texts: Path,
    into: Sequence[NDArray[np.float16]],
    shard_done: Callable[[], None] = lambda: None,
) -> None:
    """Writes every latent's mean strength over every text into one array `[N, d_sae]` an SAE, which holds zeros."""
    rises = [torch.from_numpy(scale) - sae.threshold for sae, scale in zip(suite, scales, strict=True)]
    # Most latents of a pack that was opened again are silent whatever comes.
    speaking = [sae.speaking for sae in suite]
    suite = [sae.rows(some) for sae, some in zip(suite, speaking, strict=True)]
    for shard, piece, span in by_text(texts):
        size = torch.bincount(piece, minlength=span.stop - span.start).clamp(min=1)
        for sae, some, rise, out in zip(suite, speaking, rises, into, strict=True):
            sums = pool_sae(sae, shard[sae.hook_point], piece, span.stop - span.start, rise[some])
            out[span, some.numpy()] = (sums / size[:, None]).half().numpy()
        shard_done()


def text_count(texts: Path) -> int:
    last = shards.load(texts, shards.described(texts).shard_count - 1)["piece"]
    return 1 + max(int(last.max()), 0)


def by_text(texts: Path) -> Iterator[tuple[dict[str, Tensor], Tensor, slice]]:
    """Every shard, the text of each of its tokens counted from the shard's first, and which texts it holds."""
    for index in range(shards.described(texts).shard_count):
        shard = shards.load(texts, index)
        piece = shard["piece"].long()
        first, last = int(piece.min()), int(piece.max()) + 1
        yield shard, piece - first, slice(first, last)


def pool_sae(sae: FullSae, x_all: Tensor, text: Tensor, count: int, rise: Tensor) -> Tensor:
    sums = torch.zeros(count * sae.width)
    for x, where in zip(x_all.split(_BLOCK), text.split(_BLOCK), strict=True):
        acts = sae.encode(x)
        token, row = acts.nonzero(as_tuple=True)  # few fire: sums over hits, not over [T, d_sae]
        excess = acts[token, row] - sae.threshold[row]
        sums.scatter_add_(0, where[token] * sae.width + row, (excess / rise[row]).clamp_(min=0.0, max=1.0))
    return sums.view(count, sae.width)
