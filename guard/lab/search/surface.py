"""Surface forms: latents that fire on a character, a token or a language, whatever is said in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from guard.lab import shards
from guard.lab.labelled import Pair
from guard.lab.suite.sae import FullSae

TOKEN_SHARE = 0.5  # of a latent's firings on one token
BOTH_SIDES = 0.5  # of a language's pairs that it fires on both sides of,
OTHER_LANGUAGES = 0.1  # where it does so in this share of the others' at most
LEAST_FIRINGS = 20  # with fewer, nothing is said of a latent's tokens
_BLOCK = 4096


@dataclass(frozen=True)
class TokenUse:
    """The token that each of some latents fires on most often; -1 and NaN where it fired too rarely to say."""

    token: NDArray[np.int64]  # [C] its id
    share: NDArray[np.float64]  # [C] of the latent's firings
    coverage: NDArray[np.float64]  # [C] of the token's occurrences in which the latent fires


@dataclass(frozen=True)
class SurfaceMark:
    surface: bool | None  # None: not known
    why: str


@torch.no_grad()
def token_use(
    suite: Sequence[FullSae],
    latents: Sequence[NDArray[np.int64]],
    texts: Path,
    shard_count: int,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> list[TokenUse] | None:
    """Of the named latents of every SAE, over `shard_count` shards spread evenly; None where shards hold no token ids.

    Shards are read once for the whole suite; memory holds one of them, and the counts.
    """
    there = shards.described(texts).shard_count
    indices = sorted(set(np.linspace(0, there - 1, min(shard_count, there)).round().astype(int).tolist()))
    counts: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = [(np.zeros(0, int), np.zeros(0, int)) for _ in suite]
    seen = np.zeros(0, dtype=np.int64)  # occurrences by token id
    for done, index in enumerate(indices, 1):
        shard = shards.load(texts, index)
        if "token" not in shard:
            return None
        token = shard["token"].long()
        now = np.bincount(token.numpy(), minlength=len(seen))
        now[: len(seen)] += seen
        seen = now
        for number, (sae, chosen) in enumerate(zip(suite, latents, strict=True)):
            if len(chosen):
                keys = _firings(sae, chosen, shard[sae.hook_point], token)
                counts[number] = _added(counts[number], np.unique(keys, return_counts=True))
        progress(done, len(indices))
    return [_use(keys, count, len(chosen), seen) for (keys, count), chosen in zip(counts, latents, strict=True)]


def _firings(sae: FullSae, chosen: NDArray[np.int64], x_all: torch.Tensor, token: torch.Tensor) -> NDArray[np.int64]:
    """One number a firing: place among `chosen` in the high bits, the token's id in the low ones."""
    rows = torch.from_numpy(chosen)
    part = sae
    if sae.subset_exact:
        part = replace(sae, enc_rows=sae.enc_rows[rows], bias=sae.bias[rows], threshold=sae.threshold[rows])
    found = []
    for x, ids in zip(x_all.split(_BLOCK), token.split(_BLOCK), strict=True):
        acts = part.encode(x)
        where, place = (acts if sae.subset_exact else acts[:, rows]).nonzero(as_tuple=True)
        found.append((place << 32 | ids[where]).numpy())
    return np.concatenate(found)


def _added(
    a: tuple[NDArray[np.int64], NDArray[np.int64]], b: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    keys, place = np.unique(np.concatenate([a[0], b[0]]), return_inverse=True)
    return keys, np.bincount(place, weights=np.concatenate([a[1], b[1]]), minlength=len(keys)).astype(np.int64)


def _use(keys: NDArray[np.int64], count: NDArray[np.int64], latents: int, seen: NDArray[np.int64]) -> TokenUse:
    owner, token = keys >> 32, keys & 0xFFFFFFFF
    firings = np.bincount(owner, weights=count, minlength=latents)
    result = TokenUse(np.full(latents, -1), np.full(latents, np.nan), np.full(latents, np.nan))
    order = np.lexsort((count, owner))  # the most frequent token of each latent stands last
    owner, token, count = owner[order], token[order], count[order]
    last = np.flatnonzero(np.diff(owner, append=latents))
    last = last[firings[owner[last]] >= LEAST_FIRINGS]
    who = owner[last]
    result.token[who] = token[last]
    result.share[who] = count[last] / firings[who]
    result.coverage[who] = count[last] / seen[token[last]]
    return result


def bound_to_language(
    pairs: Sequence[Pair], fires_with: NDArray[np.bool_], fires_without: NDArray[np.bool_]
) -> list[str]:
    """For each latent of `[pairs, K]` the one language whose pairs it fires on both sides of, or an empty string."""
    both = fires_with & fires_without
    langs = np.array([pair.lang for pair in pairs])
    result = np.full(both.shape[1], "", dtype=object)
    for lang in np.unique(langs):
        if (langs == lang).all():
            continue  # nothing to compare with
        inside, outside = both[langs == lang].mean(axis=0), both[langs != lang].mean(axis=0)
        result[(inside >= BOTH_SIDES) & (outside <= OTHER_LANGUAGES)] = str(lang)
    return [str(lang) for lang in result]


def mark(share: float | None, token: int, lang: str, *, by_contrast: bool) -> SurfaceMark:
    """Whether a candidate is a surface form: bound to one token or one language, and its pairs do not speak for it.

    `share`: of its firings on `token`, its most frequent one; None where that is not known.
    """
    reasons = []
    if share is not None and share >= TOKEN_SHARE:
        reasons.append(f"{share:.0%} of its firings on token {token}")
    if lang:
        reasons.append(f"fires on both sides of {lang} pairs")
    if not reasons:
        return SurfaceMark(None, "tokens not known") if share is None else SurfaceMark(surface=False, why="")
    if by_contrast:
        return SurfaceMark(surface=False, why=f"{'; '.join(reasons)}; but its pairs tell the concept")
    return SurfaceMark(surface=True, why="; ".join(reasons))
