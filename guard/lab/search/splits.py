"""Splits of what is judged: groups of sources into folds, contrast pairs into halves."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from guard.lab.heads.evaluate import judging_sources
from guard.lab.heads.features import PooledTexts
from guard.lab.heads.fit import HEADS, Design, FitConfig, Head
from guard.lab.labelled import PAIRS, Pair, Row

_LEAST = 10  # positives and negatives of a stratum


def balanced(load: NDArray[np.float64], parts: int) -> NDArray[np.int64]:
    """The part of each group `[G]`, so that every column of `load [G, H]` is spread over the parts.

    Heaviest first, each to the part that holds least of what it brings.
    """
    share = load / np.maximum(load.sum(axis=0), 1e-12)
    held = np.zeros((parts, load.shape[1]))
    result = np.zeros(len(load), dtype=np.int64)
    for group in np.argsort(-share.sum(axis=1), kind="stable"):
        overlap = held @ share[group]
        part = min(range(parts), key=lambda i: (overlap[i], held[i].sum()))
        held[part] += share[group]
        result[group] = part
    return result


def split_groups(found: Sequence[tuple[str, int]], parts: int) -> dict[str, int]:
    """The part of each group; `found` names a group and a head's number for every stratum of that head in it."""
    groups = list(dict.fromkeys(group for group, _ in found))
    load = np.zeros((len(groups), len(HEADS)))
    for group, head in found:
        load[groups.index(group), head] += 1
    return {group: int(part) for group, part in zip(groups, balanced(load, parts), strict=True)}


def first_half(pairs: Sequence[Pair], seed: int = 0) -> NDArray[np.bool_]:
    """Half of the pairs of every sub-domain and language."""
    rng = np.random.default_rng(seed)
    result = np.zeros(len(pairs), dtype=bool)
    kinds = [(p.domain, p.subdomain, p.lang) for p in pairs]
    for kind in dict.fromkeys(kinds):
        members = rng.permutation([i for i, k in enumerate(kinds) if k == kind])
        result[members[: len(members) // 2]] = True
    return result


def without_features(rows: Sequence[Row]) -> Design:
    """Targets and sources of rows, where no feature is wanted."""
    empty = PooledTexts(
        np.ones(len(rows), dtype=np.int64),
        np.zeros((len(rows), 0), dtype=np.float32),
        np.zeros((len(rows), 0), dtype=np.float16),
    )
    return Design(rows, empty, FitConfig())


def strata(rows: Sequence[Row]) -> dict[Head, list[tuple[str, str, NDArray[np.int64], NDArray[np.bool_]]]]:
    """By head: (name, group, rows, which of them are positives) of every source and language that has enough of both.

    Contrast pairs are no part of it. Texts of one source in two languages are apart, lest a language be taken for a
    concept.
    """
    design = without_features(rows)
    lang = np.array([row.lang for row in rows])
    result: dict[Head, list[tuple[str, str, NDArray[np.int64], NDArray[np.bool_]]]] = {}
    for head in HEADS:
        result[head] = []
        for source, judged, _ in judging_sources(design, head):
            if source == PAIRS:
                continue
            for language in np.unique(lang[judged]):
                chosen = np.flatnonzero(judged & (lang == language))
                positive = design.targets[head][chosen] == 1
                if min(positive.sum(), (~positive).sum()) >= _LEAST:
                    result[head].append((f"{source}/{language}", str(design.group[chosen[0]]), chosen, positive))
    return result
