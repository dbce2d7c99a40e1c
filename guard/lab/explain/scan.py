"""Which texts are worth showing for each latent: all texts are read once, shard by shard, for all latents together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.lab.explain.pieces import Bools, Pieces
from guard.lab.heads.features import Ints
from guard.lab.suite.sae import FullSae

_BLOCK = 1 << 24  # numbers of a block of pre-activations: 64 MB


class Reading:
    """Some latents of an SAE, as they stand to their thresholds."""

    def __init__(self, sae: FullSae, latents: Ints) -> None:
        self.hook_point, self.latents = sae.hook_point, torch.from_numpy(latents)
        self._sae, self._alone = sae, sae.subset_exact
        if self._alone:  # else a latent fires only if it is among the largest of all
            self._sae = sae.rows(self.latents)
        self.width = self._sae.width

    def excess(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """`x [T, d_model]` -> `[T, C]`, or of some of the C: above 0 where it fires, else how far it is from that."""
        columns = slice(None) if chosen is None else chosen
        if self._alone:
            pre = torch.addmm(self._sae.bias[columns], x.float(), self._sae.enc_rows[columns].T)
            return pre - self._sae.threshold[columns]
        pre = torch.addmm(self._sae.bias, x.float(), self._sae.enc_rows.T)
        last = pre.topk(self._sae.k, dim=1).values[:, -1:]  # [T, 1] the smallest that fires
        mine = pre[:, self.latents[columns]]
        return torch.where(mine >= last, mine, mine - last)

    def threshold(self, chosen: Tensor) -> Tensor:
        """What `excess` is counted from where a latent fires: added to it, it gives the activation."""
        return self._sae.threshold[chosen if self._alone else self.latents[chosen]]

    def activations(self, x: Tensor, chosen: Tensor) -> Tensor:
        """`[T, d_model]` -> `[T, n]`, 0 where silent."""
        excess = self.excess(x, chosen)
        return torch.where(excess > 0, excess + self.threshold(chosen), 0.0)


class Best:
    """For each of C latents the `size` texts with the largest key so far, the largest first."""

    def __init__(self, size: int, latents: int) -> None:
        self.key = torch.full((size, latents), -torch.inf)  # [size, C]
        self.excess = torch.zeros(size, latents)  # at the text's peak
        self.piece = torch.full((size, latents), -1, dtype=torch.int32)  # -1: there are not so many
        self.token = torch.zeros(size, latents, dtype=torch.int16)  # where in the text the peak is

    def offer(self, key: Tensor, excess: Tensor, piece: Tensor, token: Tensor) -> None:
        """`[n, C]` each; a key of -inf is not kept."""
        new = {"key": key, "excess": excess, "piece": piece.where(key > -torch.inf, -1), "token": token}
        kept = torch.cat([self.key, key]).topk(len(self.key), dim=0).indices
        for name, values in new.items():
            setattr(self, name, torch.cat([getattr(self, name), values]).gather(0, kept))

    def of(self, latent: int) -> list[tuple[int, int, float]]:
        """(text, token, excess) of one latent."""
        there = self.piece[:, latent] >= 0
        columns = (self.piece, self.token, self.excess)
        return list(zip(*(column[there, latent].tolist() for column in columns), strict=True))


@dataclass(frozen=True)
class Scan:
    """Of C latents of one SAE. Bytes: C * (14 * texts kept + P / 8)."""

    top: Best  # where it fires most
    sample: Best  # where it fires, at random
    near: Best  # where it is silent, and closest to firing
    packed: NDArray[np.uint8]  # [P, C / 8] whether it fires in a text, bit by bit

    def fires(self, latent: int) -> Bools:
        """`[P]`: whether it fires anywhere in a text."""
        result: Bools = (self.packed[:, latent // 8] >> (7 - latent % 8) & 1).astype(bool)
        return result


@torch.no_grad()
def scan(
    pieces: Pieces,
    readings: Sequence[Reading],
    *,
    top: int,
    sample: int,
    near: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> list[Scan]:
    """One for each of `readings`. Memory: what is kept, a shard's activations at one hook point, and a block."""
    draws = torch.Generator().manual_seed(seed)
    sizes = [len(reading.latents) for reading in readings]
    result = [
        Scan(Best(top, c), Best(sample, c), Best(near, c), np.zeros((len(pieces), -(-c // 8)), dtype=np.uint8))
        for c in sizes
    ]
    for number in range(len(pieces.files)):
        mine = np.flatnonzero(pieces.shard == number)
        for reading, found in zip(readings, result, strict=True) if len(mine) else ():
            x = pieces.activations(number, reading.hook_point)
            for block in _blocks(pieces, mine, reading.width):
                peak, token = _peaks(reading, pieces, block, x)
                fires = peak > 0
                found.packed[block] = np.packbits(fires.numpy(), axis=1)
                piece = torch.from_numpy(block).int()[:, None].expand_as(peak)
                chance = torch.rand(peak.shape, generator=draws)
                found.top.offer(peak.where(fires, -torch.inf), peak, piece, token)
                found.sample.offer(chance.where(fires, -torch.inf), peak, piece, token)
                found.near.offer(peak.where(~fires, -torch.inf), peak, piece, token)
        progress(number + 1, len(pieces.files))
    return result


def _peaks(reading: Reading, pieces: Pieces, block: Ints, x_all: Tensor) -> tuple[Tensor, Tensor]:
    """The largest excess of each latent over each text of a block, and the token where it is, `[n, C]`."""
    sizes = [len(pieces.tokens(piece)) for piece in block]
    x = torch.cat([x_all[pieces.offset[p] : pieces.offset[p] + n] for p, n in zip(block, sizes, strict=True)])
    peaks = [part.max(dim=0) for part in reading.excess(x).split(sizes)]
    return torch.stack([p.values for p in peaks]), torch.stack([p.indices for p in peaks]).short()


def _blocks(pieces: Pieces, mine: Ints, width: int) -> Iterator[Ints]:
    """Texts whose pre-activations fit in a block together; one text may be larger than that."""
    tokens = np.cumsum(np.diff(pieces.start)[mine])
    groups = tokens // max(_BLOCK // width, 1)
    return iter(np.split(mine, np.flatnonzero(np.diff(groups)) + 1))
