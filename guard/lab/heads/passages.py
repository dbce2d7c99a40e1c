"""Passages of texts that are longer than one: what heads see of them beside the whole (decision 4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from guard.kernels.contract import rms_normalised
from guard.lab import shards
from guard.lab.heads.features import Floats, Ints, by_text, pool_sae
from guard.lab.suite.sae import FullSae


@dataclass(frozen=True)
class Passages:
    text: Ints  # [M] the text that each is of
    tokens: Ints  # [M]
    mean: Floats  # [M, hook points * d_model], as in PooledTexts
    strength: Floats  # [M, A] mean over the tokens, of the latents that heads may read

    @staticmethod
    def joined(parts: Sequence["Passages"]) -> "Passages":
        parts = [part for part in parts if len(part.text)] or list(parts[:1])
        return Passages(
            np.concatenate([p.text for p in parts]),
            np.concatenate([p.tokens for p in parts]),
            np.concatenate([p.mean for p in parts]),
            np.concatenate([p.strength for p in parts]),
        )


@torch.no_grad()
def pool_passages(
    suite: Sequence[FullSae], scales: Sequence[Floats], rows: Sequence[Ints], texts: Path, size: int
) -> Passages:
    """The passages of `size` tokens of every text that is longer; `rows`: of each SAE, the latents to pool.

    They overlap by half, and are cut as `guard.scoring.phase.PhaseState` cuts a phase: every two halves in a row, the
    last as long as it is. Of a topk SAE a few rows would say more than in the whole.
    """
    half = size // 2
    cut = [sae.rows(torch.from_numpy(some)) for sae, some in zip(suite, rows, strict=True)]
    rises = [torch.from_numpy(scale[some]) - sae.threshold for sae, scale, some in zip(cut, scales, rows, strict=True)]
    points = list(dict.fromkeys(sae.hook_point for sae in suite))
    found: list[tuple[Ints, Ints, Floats, Floats]] = []
    for shard, piece, span in by_text(texts):
        length = torch.bincount(piece, minlength=span.stop - span.start)
        place = torch.arange(len(piece)) - (length.cumsum(0) - length)[piece]
        halves = torch.where(length > size, (length + half - 1) // half, 0)
        first = halves.cumsum(0) - halves
        long = (length > size)[piece].nonzero()[:, 0]
        if not len(long):
            continue
        where, count = (first[piece] + place // half)[long], int(halves.sum())
        strength = torch.cat(
            [
                pool_sae(sae, shard[sae.hook_point][long], where, count, rise)
                for sae, rise in zip(cut, rises, strict=True)
            ],
            dim=1,
        )
        seen = torch.cat([rms_normalised(shard[point][long].float()) for point in points], dim=1)
        mean = torch.zeros(count, seen.shape[1]).index_add_(0, where, seen)
        tokens = torch.bincount(where, minlength=count)
        text = torch.repeat_interleave(torch.arange(span.start, span.stop), halves)
        pairs = (text[1:] == text[:-1]).nonzero()[:, 0]  # two halves of one text
        both = tokens[pairs] + tokens[pairs + 1]
        found.append(
            (
                text[pairs].numpy(),
                both.numpy(),
                ((mean[pairs] + mean[pairs + 1]) / both[:, None]).numpy(),
                ((strength[pairs] + strength[pairs + 1]) / both[:, None]).numpy(),
            )
        )
    parts = [Passages(*arrays) for arrays in found]
    return Passages.joined(parts or [_none(len(points) * shards.described(texts).d_model, sum(map(len, rows)))])


def _none(directions: int, latents: int) -> Passages:
    nothing = np.zeros(0, dtype=np.int64)
    return Passages(nothing, nothing, np.zeros((0, directions), np.float32), np.zeros((0, latents), np.float32))
