"""Surface forms: latents that fire on a character, a token or a language, whatever is said in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.errors import InvalidInput
from guard.lab import shards
from guard.lab.labelled import Pair
from guard.lab.suite.sae import FullSae

TOKEN_SHARE = 0.5  # of a latent's firings on one token,
TOKEN_COVERAGE = 0.5  # in this share of whose occurrences it fires: with less, it is not the token that it answers to
BOTH_SIDES = 0.5  # of a language's pairs that it fires on both sides of,
OTHER_LANGUAGES = 0.1  # where it does so in this share of the others' at most
LEAST_FIRINGS = 20  # with fewer, nothing is said of a latent's tokens
_BLOCK = 4096


@dataclass(frozen=True)
class TokenUse:
    """The token that a latent fires on most often."""

    token: int  # its id
    share: float  # of the latent's firings
    coverage: float  # of the token's occurrences in which the latent fires


@dataclass(frozen=True)
class SurfaceMark:
    surface: bool | None  # None: not known
    why: str


@torch.no_grad()
def token_use(
    suite: Sequence[FullSae],
    latents: Sequence[NDArray[np.int64]],
    texts: Path,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> list[list[TokenUse | None]] | None:
    """Of the named latents of every SAE, over all tokens of the texts: None for one that fired too rarely to say.

    None for all where the shards hold no token ids. Memory holds the activations of one hook point, and a count of
    every latent and token of one SAE. Raises InvalidInput for a hook point that the texts were harvested without.
    """
    read = shards.load_each(texts, "token")
    if read is None:
        return None
    ids, token, seen = torch.cat(read).long().unique(return_inverse=True, return_counts=True)
    found: dict[int, list[TokenUse | None]] = {}
    for point in dict.fromkeys(sae.hook_point for sae in suite):
        x_all = shards.load_each(texts, point)
        if x_all is None:
            raise InvalidInput(
                f"{texts}: harvested without {point}; harvest the texts again at the suite's hook points"
            )
        blocks = [block for x in x_all for block in x.split(_BLOCK)]
        for number, sae in enumerate(suite):
            if sae.hook_point == point:
                firings = _firings(sae, latents[number], blocks, token, len(ids))
                found[number] = [_most_frequent(counts, ids, seen) for counts in firings]
                progress(len(found), len(suite))
        del x_all, blocks  # before the next point's are read
    return [found[number] for number in range(len(suite))]


def _firings(sae: FullSae, chosen: NDArray[np.int64], blocks: Sequence[Tensor], token: Tensor, tokens: int) -> Tensor:
    """How often each of the chosen latents fires on each token, `[C, tokens]`."""
    rows = torch.from_numpy(chosen)
    part = sae.rows(rows) if sae.subset_exact else sae
    counts = torch.zeros(len(rows) * tokens, dtype=torch.int32)
    for x, ids in zip(blocks, token.split([len(block) for block in blocks]), strict=True):
        acts = part.encode(x)
        where, place = (acts if sae.subset_exact else acts[:, rows]).nonzero(as_tuple=True)
        counts.scatter_add_(0, place * tokens + ids[where], torch.ones(len(where), dtype=torch.int32))
    return counts.view(-1, tokens)


def _most_frequent(counts: Tensor, ids: Tensor, seen: Tensor) -> TokenUse | None:
    """`counts`, `ids` and `seen` `[tokens]`: a latent's firings, the tokens' ids and all their occurrences."""
    firings, most = int(counts.sum()), int(counts.argmax())
    if firings < LEAST_FIRINGS:
        return None
    return TokenUse(int(ids[most]), int(counts[most]) / firings, int(counts[most]) / int(seen[most]))


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


def mark(use: TokenUse | None, lang: str, *, by_contrast: bool, unknown: str = "tokens not known") -> SurfaceMark:
    """Whether a candidate is a surface form: bound to one token, or to one language where no pair speaks for it.

    One token is enough whatever the pairs say, for what leaves the concept out leaves out its words. `unknown`: why
    `use` is None.
    """
    reasons, bound = [], False
    if use is not None and use.share >= TOKEN_SHARE:
        bound = use.coverage >= TOKEN_COVERAGE
        reasons.append(f"{use.share:.0%} of its firings on token {use.token}, on {use.coverage:.0%} of its occurrences")
    if lang:
        reasons.append(f"fires on both sides of {lang} pairs")
        bound = bound or not by_contrast
    if reasons and by_contrast:
        reasons.append("but its pairs tell the concept")
    if use is None and not bound:
        return SurfaceMark(None, "; ".join([*reasons, unknown]))
    return SurfaceMark(surface=bound, why="; ".join(reasons))
