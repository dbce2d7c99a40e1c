"""Words: the latents that answer to a domain's own words, whatever the text around them is about.

A latent of "naked" fires in novels and in news as well as where the domain is, so that neither pairs nor labelled texts
point to it: most of its texts are about something else. Its tokens do. A token is telling of a domain where the
project's own sentences that hold it are about the domain; a latent is ranked by the share of its activation that falls
on telling tokens.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from guard.errors import InvalidInput
from guard.lab import shards
from guard.lab.labelled import DOMAINS, Row, target
from guard.lab.suite.sae import FullSae
from guard.records import HeadKind

TELLING = 0.75  # of the own sentences that hold a token, the share about the domain, at least; .5 is chance
_SURE = 1.645  # standard deviations below what was seen
_BLOCK = 4096

Floats = NDArray[np.float32]


def telling_tokens(rows: Sequence[Row], texts: Path) -> Floats:
    """1 where a token is telling of a domain, else 0: `[token ids, domains]`.

    Of a token, the share of own sentences about the domain among those that hold it, both classes counted alike in sum;
    the lower end of Wilson's interval. Raises InvalidInput for texts that were harvested without token ids.
    """
    read, pieces = shards.load_each(texts, "token"), shards.load_each(texts, "piece")
    if read is None or pieces is None:
        raise InvalidInput(f"{texts}: holds no token ids; harvest the texts again")
    token = torch.cat(read).numpy().astype(np.int64)
    held = np.unique(torch.cat(pieces).numpy() * (int(token.max()) + 1) + token)  # each token once a text
    piece, token = np.divmod(held, int(token.max()) + 1)
    result = np.zeros((int(token.max()) + 1, len(DOMAINS)), dtype=np.float32)
    for column, domain in enumerate(DOMAINS):
        y = [target(row, domain, HeadKind.PRESENCE) if row.own else None for row in rows]
        sides = [np.array([said is side for said in y]) for side in (True, False)]
        about, other = (np.bincount(token[of[piece]], minlength=len(result)) for of in sides)
        n = np.maximum(about + other, 1)
        rate = about / max(sides[0].sum(), 1)
        share = rate / np.maximum(rate + other / max(sides[1].sum(), 1), 1e-12)
        spread = _SURE * np.sqrt(share * (1 - share) / n + _SURE**2 / (4 * n * n))
        result[:, column] = (share + _SURE**2 / (2 * n) - spread) / (1 + _SURE**2 / n) > TELLING
    return result


@torch.no_grad()
def shares(
    suite: Sequence[FullSae],
    texts: Path,
    telling: Floats,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> list[Floats]:
    """Of each latent's activation over the texts, what falls on a domain's telling tokens: `[width, domains]` an SAE.

    Memory holds a shard at a time. Raises InvalidInput for a hook point that the texts were harvested without.
    """
    made = shards.described(texts)
    if strangers := [sae.hook_point for sae in suite if sae.hook_point not in made.hook_points]:
        raise InvalidInput(
            f"{texts}: harvested without {strangers[0]}; harvest the texts again at the suite's hook points"
        )
    told = torch.cat([torch.from_numpy(telling), torch.ones(len(telling), 1)], dim=1)  # the last column: all tokens
    sums = [torch.zeros(sae.width, told.shape[1]) for sae in suite]
    for index in range(made.shard_count):
        shard = shards.load(texts, index)
        for block in torch.arange(len(shard["token"])).split(_BLOCK):
            says = told[shard["token"][block].long()]
            for sae, total in zip(suite, sums, strict=True):
                total.addmm_(sae.encode(shard[sae.hook_point][block]).T, says)
        progress(index + 1, made.shard_count)
    return [(total[:, :-1] / total[:, -1:].clamp(min=1e-9)).numpy() for total in sums]
