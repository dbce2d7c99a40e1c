"""What the report counts: pure functions from firings and activations to figures.

`fired [N, K]` says on which of N sentences each of K latents fires.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guard.lab.heads.features import Floats, Ints
from guard.lab.report.reading import Bools
from guard.lab.search import rank

Doubles = NDArray[np.float64]

OWN_SENTENCES = 5  # of its six, on which an item's latent must fire
OTHER_SHARE = 0.02  # of all other sentences, on which it may


_SITES = {"mlp": "MLP output", "mlp.down_proj": "MLP output"}


@dataclass(frozen=True)
class Place:
    """Where a hook point reads: the layer's number, and what of the layer."""

    site: str
    depth: int

    @property
    def short(self) -> str:
        return f"{'MLP' if self.site == 'MLP output' else self.site} {self.depth}"


def place(hook_point: str) -> Place:
    """`model.layers.14.mlp.down_proj` -> MLP output, 14."""
    found = rank.site(hook_point)
    return Place(_SITES.get(found, found), rank.depth(hook_point))


def item_latents(
    fired: Bools, item: Sequence[int] | Ints, *, least: int = OWN_SENTENCES, most: float = OTHER_SHARE
) -> Bools:
    """`[items, K]`: latents that fire on at least `least` of an item's sentences and on at most `most` of all others.

    `item [N]` numbers the item of each sentence from 0.
    """
    member = np.equal.outer(np.arange(max(item) + 1), np.asarray(item))  # [items, N]
    own = member.astype(np.float32) @ fired.astype(np.float32)  # [items, K]
    others = fired.sum(axis=0) - own
    allowed = most * (len(item) - member.sum(axis=1))
    result: Bools = (own >= least) & (others <= allowed[:, None])
    return result


def chance_latents(fired: Bools, item: Sequence[int], *, shuffles: int = 5, seed: int = 0) -> Doubles:
    """`[items]`: latents of each item that `item_latents` finds with sentences dealt out at random, on average."""
    generator = np.random.default_rng(seed)
    drawn = [item_latents(fired, generator.permutation(np.asarray(item))).sum(axis=1) for _ in range(shuffles)]
    result: Doubles = np.mean(drawn, axis=0)
    return result


def mean_depth(covered: Doubles, depths: Sequence[int]) -> float:
    """The depth at which items are found, on average; `covered [items, depths]` are shares of SAEs. nan: nowhere."""
    found = covered.sum(axis=0)
    return float(found @ np.asarray(depths, dtype=np.float64) / found.sum()) if found.sum() else float("nan")


def depth_gap(
    early: Doubles, late: Doubles, depths: Sequence[int], *, rounds: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """How many layers later the second kind of item is found than the first, with a 95% bootstrap over the items."""
    generator = np.random.default_rng(seed)

    def gap(first: Doubles, second: Doubles) -> float:
        return mean_depth(second, depths) - mean_depth(first, depths)

    drawn = [
        gap(
            early[generator.integers(len(early), size=len(early))],
            late[generator.integers(len(late), size=len(late))],
        )
        for _ in range(rounds)
    ]
    kept = [value for value in drawn if not np.isnan(value)]
    low, high = np.quantile(kept, (0.025, 0.975)) if kept else (np.nan, np.nan)
    return gap(early, late), float(low), float(high)


@dataclass(frozen=True)
class Overlap:
    """How alike each query and its translation are, beside queries that are not translations of each other."""

    same: float
    different: float
    error: float  # standard error, over the queries, of same - different
    found: float  # share of queries to which their own translation is the likest


def overlap(likeness: Doubles) -> Overlap:
    """`likeness [N, N]`, N > 1: row i of one language, column j of the other; a query's translation on the diagonal."""
    count = len(likeness)
    same = likeness.diagonal()
    different = (likeness.sum(axis=1) - same) / (count - 1)
    rivals = np.where(np.eye(count, dtype=bool), -np.inf, likeness).max(axis=1)
    return Overlap(
        same=float(same.mean()),
        different=float(different.mean()),
        error=float((same - different).std(ddof=1) / count**0.5),
        found=float((same > rivals).mean()),
    )


def jaccard(left: Bools, right: Bools) -> Doubles:
    """`[N, M]`: of the latents that fire on either of two texts, the share that fires on both; 0 where none does."""
    both = left.astype(np.float64) @ right.T.astype(np.float64)
    either = left.sum(axis=1)[:, None] + right.sum(axis=1)[None] - both
    result: Doubles = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
    return result


def cosine(left: Floats, right: Floats, *, apart: bool) -> Doubles:
    """`[N, M]` after the mean is taken off: each language's own where `apart`, else the mean of both together."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    if apart:
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    else:
        mean = (a.mean(axis=0) + b.mean(axis=0)) / 2
        a, b = a - mean, b - mean
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    result: Doubles = a @ b.T
    return result


LANGUAGES = ("both", "en", "zh", "few")


def language_of(en: Ints, zh: Ints, *, least: int = 3) -> list[str]:
    """How a latent that fires on `en [K]` English queries and `zh [K]` Chinese ones of the same meaning is counted.

    "en", "zh": on `least` in that language and on none in the other; "few": on fewer than `least` in either.
    """
    result = []
    for left, right in zip(en, zh, strict=True):
        if max(left, right) < least:
            result.append("few")
        else:
            result.append("both" if min(left, right) else "en" if left else "zh")
    return result


@dataclass(frozen=True)
class Knowing:
    """Latents that fire on known names and not on invented ones."""

    known: Doubles  # [frames, K] share of the frame's known names on which a latent fires
    rare: Doubles
    invented: Doubles
    latents: list[int]  # that tell them apart in half of the frames at least, the clearest first
    swapped: int  # as many the other way round: on the invented and not on the known
    shuffled: float  # as many with known and invented mixed at random within each frame, on average


def knowing(
    fired: Bools, frame: Sequence[int], kind: Sequence[str], *, shuffles: int = 20, seed: int = 0, clear: float = 0.75
) -> Knowing:
    """A latent tells a frame apart where it fires on at least `clear` of one kind and at most 1 - `clear` of the other.

    `frame [N]` counts from 0, `kind [N]` is known, rare or invented; every frame holds each of the three.
    """
    frames, kinds = np.asarray(frame), np.asarray(kind)

    def share(of: str, named: NDArray[np.str_]) -> Doubles:
        return np.stack([fired[(frames == f) & (named == of)].mean(axis=0) for f in range(frames.max() + 1)])

    def tell(on: Doubles, off: Doubles) -> Bools:
        apart = (on >= clear) & (off <= 1 - clear)
        result: Bools = 2 * apart.sum(axis=0) >= len(on)
        return result

    known, rare, invented = (share(of, kinds) for of in ("known", "rare", "invented"))
    found = np.flatnonzero(tell(known, invented))
    by_gap = found[np.argsort(-(known - invented).mean(axis=0)[found], kind="stable")]
    generator = np.random.default_rng(seed)
    counts = []
    for _ in range(shuffles):
        mixed = kinds.copy()
        for f in range(frames.max() + 1):
            where = np.flatnonzero((frames == f) & (kinds != "rare"))
            mixed[where] = generator.permutation(mixed[where])
        counts.append(tell(share("known", mixed), share("invented", mixed)).sum())
    swapped = int(tell(invented, known).sum())
    return Knowing(known, rare, invented, [int(i) for i in by_gap], swapped, float(np.mean(counts)))
