"""A map of decoder directions: what points alike lies together."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from guard.lab.heads.features import Floats

LEAST = 5  # directions, below which a map says nothing


def directions(rows: Floats) -> NDArray[np.float64]:
    """Rows `[n, d_model]` at length 1; one of length 0 stays."""
    given = rows.astype(np.float64)
    result: NDArray[np.float64] = given / np.maximum(np.linalg.norm(given, axis=1, keepdims=True), 1e-12)
    return result


def flat_map(rows: Floats, *, seed: int = 0) -> NDArray[np.float64]:
    """`[n, d_model]` -> `[n, 2]`: PCA to 50 dimensions, then t-SNE; n is LEAST or more. Same rows, same map."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    unit = directions(rows)
    fewer = PCA(n_components=min(50, *unit.shape), random_state=seed, svd_solver="full").fit_transform(unit)
    perplexity = min(30.0, (len(unit) - 1) / 3)
    result: NDArray[np.float64] = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(fewer)
    return result.astype(np.float64)


def like_neighbours(rows: Floats, labels: Sequence[str], *, near: int = 5) -> tuple[float, float]:
    """Share of the `near` nearest directions (in all dimensions) with the same label, and that share by chance."""
    unit = directions(rows)
    likeness = unit @ unit.T
    np.fill_diagonal(likeness, -np.inf)
    nearest = np.argsort(-likeness, axis=1, kind="stable")[:, : min(near, len(unit) - 1)]
    names = np.asarray(labels)
    found = float((names[nearest] == names[:, None]).mean())
    counts = np.unique(names, return_counts=True)[1]
    by_chance = float((counts * (counts - 1)).sum() / (len(names) * (len(names) - 1)))
    return found, by_chance
