"""Texts as the heads see them: for each text, the mean activation and every latent's pooled activation.

`guard lab harvest --texts` has read the texts; this module encodes what it kept with whole SAEs, and pools.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.kernels.contract import rms_normalised
from guard.lab import shards
from guard.lab.sae import FullSae

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
_BLOCK = 4096


@dataclass(frozen=True)
class LatentStats:
    """Of every latent of a suite, numbered through its SAEs, over a corpus."""

    firing_rate: Floats  # [K] share of tokens
    scale: Floats  # [K] what activations are divided by
    quantiles: dict[str, Floats]  # of the activations that are not zero


@dataclass(frozen=True)
class PooledTexts:
    tokens: NDArray[np.int64]  # [N]
    mean: Floats  # [N, hook points * d_model] of RMS-normalised activations, as probes read them
    clip: NDArray[np.float16]  # [N, K] sum of min(value / scale, 1) over the tokens, divided by their number
    fire: NDArray[np.float16]  # [N, K] share of tokens on which the latent fires


def latent_stats(
    suite: list[FullSae], activations: Path, *, shard_count: int = 10, quantile: float = 0.95
) -> LatentStats:
    """Firing rates and scales over the first shards of a harvest.

    The scale is a high quantile of a latent's own firing activations, so that one outlier does not set it, with a floor
    of half the median scale of its SAE: a latent that hardly ever fired would otherwise be divided by next to nothing.
    """
    rates, scales = [], []
    quantiles: dict[str, list[Floats]] = {"0.5": [], "0.9": [], "0.99": []}
    for sae in suite:
        row_parts, value_parts, tokens = [], [], 0
        for index in range(min(shard_count, shards.described(activations).shard_count)):
            x_all = shards.load(activations, index)[sae.hook_point]
            for x in x_all.split(_BLOCK):
                acts = sae.encode(x)
                row = acts.nonzero(as_tuple=True)
                row_parts.append(row[1].to(torch.int32).numpy())
                value_parts.append(acts[row].numpy())
            tokens += len(x_all)
        rows, values = np.concatenate(row_parts), np.concatenate(value_parts)
        order = np.lexsort((values, rows))
        rows, values = rows[order], values[order]
        starts = np.searchsorted(rows, np.arange(sae.width))
        ends = np.searchsorted(rows, np.arange(sae.width), side="right")
        counts = ends - starts
        alive = counts > 0

        def at(q: float, starts: Ints = starts, counts: Ints = counts, values: Floats = values) -> Floats:
            place = starts + np.floor(q * np.maximum(counts - 1, 0)).astype(np.int64)
            return np.where(counts > 0, values[np.minimum(place, len(values) - 1)], 0.0).astype(np.float32)

        high = at(quantile)
        floor = 0.5 * float(np.median(high[alive]))
        scales.append(np.maximum(high, floor).astype(np.float32))
        rates.append((counts / tokens).astype(np.float32))
        for name, kept in quantiles.items():
            kept.append(at(float(name)))
    return LatentStats(
        firing_rate=np.concatenate(rates),
        scale=np.concatenate(scales),
        quantiles={name: np.concatenate(kept) for name, kept in quantiles.items()},
    )


@torch.no_grad()
def pool(
    suite: list[FullSae],
    texts: Path,
    scale: Floats,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> PooledTexts:
    """Pools every text of a harvest of texts. Needs `6 * N * K` bytes for the result."""
    described = shards.described(texts)
    count = 1 + max(int(shards.load(texts, described.shard_count - 1)["piece"].max()), 0)
    width = sum(sae.width for sae in suite)
    tokens = np.zeros(count, dtype=np.int64)
    mean = np.zeros((count, len(suite) * described.d_model), dtype=np.float32)
    clip = np.zeros((count, width), dtype=np.float16)
    fire = np.zeros((count, width), dtype=np.float16)
    for index in range(described.shard_count):
        shard = shards.load(texts, index)
        piece = shard["piece"].long()
        first, last = int(piece.min()), int(piece.max()) + 1
        size = torch.bincount(piece - first, minlength=last - first).clamp(min=1)
        tokens[first:last] = size.numpy()
        column = 0
        for number, sae in enumerate(suite):
            x_all = shard[sae.hook_point].float()
            sums = torch.zeros(last - first, x_all.shape[1]).index_add_(0, piece - first, rms_normalised(x_all))
            place = slice(number * described.d_model, (number + 1) * described.d_model)
            mean[first:last, place] = (sums / size[:, None]).numpy()
            clips, fires = _pool_sae(
                sae, x_all, piece - first, last - first, torch.from_numpy(scale)[column:][: sae.width]
            )
            clip[first:last, column : column + sae.width] = (clips / size[:, None]).half().numpy()
            fire[first:last, column : column + sae.width] = (fires / size[:, None]).half().numpy()
            column += sae.width
        progress(index + 1, described.shard_count)
    return PooledTexts(tokens, mean, clip, fire)


def _pool_sae(sae: FullSae, x_all: Tensor, text: Tensor, count: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    clips, fires = torch.zeros(count * sae.width), torch.zeros(count * sae.width)
    for x, where in zip(x_all.split(_BLOCK), text.split(_BLOCK), strict=True):
        pre = torch.addmm(sae.bias, x, sae.enc_rows.T)
        token, row = (pre > sae.threshold).nonzero(as_tuple=True)  # few fire: sums over hits, not over [T, d_sae]
        place = where[token] * sae.width + row
        fires.scatter_add_(0, place, torch.ones(len(place)))
        clips.scatter_add_(0, place, (pre[token, row] / scale[row]).clamp_(min=0.0, max=1.0))
    return clips.view(count, sae.width), fires.view(count, sae.width)
