"""Evaluate: every head judged on sources that it has not seen, in four columns.

Whole groups of sources are held out in turn; the latents are chosen, and all columns fitted, without them. Rows with a
noisy mapping are left out, but where a source has no other negatives (then `weak_negatives` says so).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from guard.lab.fit import HEADS, Bools, Design, Head, choose_latents, fit_head
from guard.records import HeadKind

COLUMNS = ("tfidf", "probe", "latents", "combined")
_LEAST = 10  # positives and negatives that a source needs to be judged on
_BOOTSTRAPS = 200


class Figure(BaseModel):
    """One head on one source that it was not fitted on."""

    domain: str
    head: HeadKind
    source: str
    lang: str
    positives: int
    negatives: int
    weak_negatives: bool
    auroc: dict[str, float]
    auroc_interval: dict[str, tuple[float, float]]  # 95%, bootstrap over rows
    auprc: dict[str, float]
    tpr_at_1_fpr: dict[str, float]


@dataclass
class OutOfFold:
    """Logits of rows by models that were fitted without their group, by head and column; NaN where there is none."""

    logits: dict[tuple[Head, str], NDArray[np.float64]] = field(default_factory=dict)


def cross_fit(
    design: Design,
    columns: Sequence[str] = COLUMNS,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> OutOfFold:
    """Fits without each group of sources in turn, and keeps the logits of what was left out."""
    groups = [g for g in np.unique(design.group) if not g.startswith("lookalike")]
    usable = ~np.array([row.source.startswith("lookalike") for row in design.rows])
    kept = OutOfFold({(h, c): np.full(len(design.rows), np.nan) for h in HEADS for c in columns})
    words = _hashed([row.text for row in design.rows]) if "tfidf" in columns else None
    for number, group in enumerate(groups):
        held_out = design.group == group
        used = usable & ~held_out
        chosen = choose_latents(design, used)
        for head in HEADS:
            test = np.flatnonzero(held_out & (design.targets[head] >= 0))
            if not len(test):
                continue
            for column in columns:
                if column == "tfidf":
                    logits = _tfidf_logits(design, head, used, words, test)
                else:
                    model = fit_head(design, head, used, chosen[head[0]], column)
                    logits = model.logits(design, test)
                kept.logits[head, column][test] = logits
        progress(number + 1, len(groups))
    return kept


def figures(design: Design, kept: OutOfFold, columns: Sequence[str] = COLUMNS) -> list[Figure]:
    return [figure for head in HEADS for figure in _figures(design, head, kept, columns)]


def _figures(design: Design, head: Head, kept: OutOfFold, columns: Sequence[str]) -> list[Figure]:
    y = design.targets[head]
    result = []
    langs = np.array([row.lang for row in design.rows])
    for source in np.unique(design.source):
        judged = (design.source == source) & (y >= 0)
        strong = judged & ~design.weak
        weak_negatives = (strong & (y == 0)).sum() < _LEAST <= (judged & (y == 0)).sum()
        rows = strong | (judged & (y == 0)) if weak_negatives else strong
        positives, negatives = int((rows & (y == 1)).sum()), int((rows & (y == 0)).sum())
        if min(positives, negatives) < _LEAST:
            continue
        scored = {c: kept.logits[head, c][rows] for c in columns}
        result.append(
            Figure(
                domain=head[0],
                head=head[1],
                source=source,
                lang="/".join(sorted(set(langs[rows]))),
                positives=positives,
                negatives=negatives,
                weak_negatives=bool(weak_negatives),
                auroc={c: round(float(roc_auc_score(y[rows], s)), 4) for c, s in scored.items()},
                auroc_interval={c: _interval(y[rows], s) for c, s in scored.items()},
                auprc={c: round(float(average_precision_score(y[rows], s)), 4) for c, s in scored.items()},
                tpr_at_1_fpr={c: round(_tpr_at(y[rows], s, 0.01), 4) for c, s in scored.items()},
            )
        )
    return result


def _interval(y: NDArray[np.int8], scores: NDArray[np.float64]) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    found = []
    positive, negative = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    for _ in range(_BOOTSTRAPS):
        rows = np.concatenate([rng.choice(positive, len(positive)), rng.choice(negative, len(negative))])
        found.append(roc_auc_score(y[rows], scores[rows]))
    low, high = np.quantile(found, [0.025, 0.975])
    return round(float(low), 4), round(float(high), 4)


def _tpr_at(y: NDArray[np.int8], scores: NDArray[np.float64], fpr: float) -> float:
    cut = np.quantile(scores[y == 0], 1.0 - fpr)
    return float((scores[y == 1] > cut).mean())


def _hashed(texts: Sequence[str]) -> object:
    """Words and pairs of words, and characters in runs of 2 to 4 (Chinese has no spaces to split at)."""
    from scipy.sparse import hstack

    words = HashingVectorizer(ngram_range=(1, 2), n_features=1 << 18, alternate_sign=False, norm=None)
    characters = HashingVectorizer(
        analyzer="char_wb", ngram_range=(2, 4), n_features=1 << 18, alternate_sign=False, norm=None
    )
    return hstack([words.transform(texts), characters.transform(texts)]).tocsr()


def _tfidf_logits(
    design: Design, head: Head, used: Bools, words: object, test: NDArray[np.int64]
) -> NDArray[np.float64]:
    y = design.targets[head]
    rows = np.flatnonzero(used & (y >= 0))
    weights = design.weights(y, used & (y >= 0))[rows]
    scaler = TfidfTransformer(sublinear_tf=True).fit(words[rows])  # type: ignore[index]
    model = LogisticRegression(C=10.0, max_iter=200, solver="liblinear")
    model.fit(scaler.transform(words[rows]), y[rows], sample_weight=weights)  # type: ignore[index]
    return np.asarray(model.decision_function(scaler.transform(words[test])))  # type: ignore[index]


def mean_auroc(figures: Sequence[Figure], column: str) -> dict[str, float]:
    """By head, the plain mean over sources."""
    by_head: dict[str, list[float]] = {}
    for figure in figures:
        by_head.setdefault(f"{figure.domain}.{figure.head.value}", []).append(figure.auroc[column])
    return {head: float(np.mean(values)) for head, values in by_head.items()}
