"""Evaluate: every head judged on sources that it has not seen, in four columns.

Whole groups of sources are held out in turn; the latents are chosen, and all columns fitted, without them. Where heads
keep to explained latents, that choice came before, with the labels of all sources that may be fitted on: those that may
not are the clean ones. Rows with a noisy mapping are left out, but where a source has no other negatives (then
`weak_negatives` says so).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from guard.lab.heads.fit import HEADS, Bools, Design, Head, choose_latents, fit_head
from guard.lab.labelled import OURS
from guard.records import HeadKind

BASELINES = ("tfidf", "probe")
COLUMNS = (*BASELINES, "latents", "combined")
SHARES = (0.2, 0.35, 0.5, 0.65, 0.8)  # of the probe in a combined head
_LEAST = 10  # positives and negatives that a source needs to be judged on
_BOOTSTRAPS = 200
_UNFITTED = "not fitted on"


class Figure(BaseModel):
    """One head on one source that it was not fitted on."""

    domain: str
    head: HeadKind
    source: str
    in_chats: bool = False  # its texts as messages and answers in chats, not bare
    lang: str
    positives: int
    negatives: int
    weak_negatives: bool
    auroc: dict[str, float]
    auroc_interval: dict[str, tuple[float, float]]  # 95%, bootstrap over rows
    lead_interval: dict[str, tuple[float, float]]  # of the combined column's AUROC over each other's, on the same rows
    auprc: dict[str, float]
    tpr_at_1_fpr: dict[str, float]


class Standing(BaseModel):
    """The combined column against a baseline, head by head and source by source."""

    baseline: str
    judged: int
    ahead: int  # or level
    ahead_beyond_chance: int  # the 95% interval of its lead lies above 0
    behind_beyond_chance: list[str]  # below 0


@dataclass
class OutOfFold:
    """Logits of rows by models that were fitted without their group, by head and column; NaN where there is none."""

    logits: dict[tuple[Head, str], NDArray[np.float64]] = field(default_factory=dict)
    passages: dict[tuple[Head, str], NDArray[np.float64]] = field(default_factory=dict)  # theirs; none of tfidf

    def update(self, other: "OutOfFold") -> None:
        self.logits.update(other.logits)
        self.passages.update(other.passages)


def cross_fit(
    design: Design,
    columns: Sequence[str],
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> OutOfFold:
    """Fits `tfidf`, `probe` or `latents` without each group of sources in turn; keeps the logits of the rest."""
    fold = _folds(design)
    groups = [g for g in np.unique(fold) if not g.startswith("lookalike")]
    kept = OutOfFold(
        {(h, c): np.full(len(design.rows), np.nan) for h in HEADS for c in columns},
        {(h, c): np.full(len(design.passage_text), np.nan) for h in HEADS for c in columns if c != "tfidf"},
    )
    words = _hashed([row.text for row in design.rows]) if "tfidf" in columns else None
    for number, group in enumerate(groups):
        held_out = fold == group
        used = design.fitted_on & ~held_out
        chosen = choose_latents(design, used) if "latents" in columns else {}
        for head in HEADS:
            test = np.flatnonzero(held_out & (design.targets[head] >= 0))
            if not len(test):
                continue
            for column in columns:
                if column == "tfidf":
                    kept.logits[head, column][test] = _tfidf_logits(design, head, used, words, test)
                    continue
                rows = chosen.get(head[0], np.zeros(0, dtype=np.int64))
                model = fit_head(design, head, used, rows, column)
                kept.logits[head, column][test] = model.logits(design, test)
                inside = model.passage_logits(design, test)
                kept.passages[head, column] = np.fmax(kept.passages[head, column], inside)
        progress(number + 1, len(groups))
    return kept


def _folds(design: Design) -> NDArray[np.str_]:
    """`[N]` what is held out together: a row's group; all groups that nothing is fitted on are one."""
    fitted_on = np.unique(design.group[design.fitted_on])
    return np.where(np.isin(design.group, fitted_on) | design.lookalike, design.group, _UNFITTED)


def probe_share(design: Design, head: Head, kept: OutOfFold, without: str = "") -> float:
    """The share of the probe in the combined head that served best on the sources, `without` the group of one to judge.

    Sources that heads may not be fitted on have no say; where none is left, half.
    """
    apart = np.isin(design.group, design.group[design.source == without])
    judged = [
        (s, rows)
        for in_chats in (False, True)
        for s, rows, _ in judging_sources(design, head, in_chats=in_chats)
        if design.usable[rows].any() and not apart[rows].any()
    ]
    y = design.targets[head]
    if not judged:
        return 0.5

    def served(share: float) -> float:
        logits = mixed(design, kept, head, share)
        return float(np.mean([roc_auc_score(y[rows], logits[rows]) for _, rows in judged]))

    return max(SHARES, key=served)


def mixed(design: Design, kept: OutOfFold, head: Head, share: float) -> NDArray[np.float64]:
    """`[N]`: the combined column, of the whole text or of its severest passage."""
    whole, passages = (
        of[head, "latents"] * (1 - share) + of[head, "probe"] * share for of in (kept.logits, kept.passages)
    )
    return design.severest(whole, passages)


def figures(design: Design, kept: OutOfFold) -> list[Figure]:
    """Every head on every source that can judge it. The combined column mixes with a share chosen on the others."""
    result = []
    for head, in_chats in product(HEADS, (False, True)):
        y = design.targets[head]
        told = {c: design.severest(kept.logits[head, c], kept.passages[head, c]) for c in ("probe", "latents")}
        told["tfidf"] = kept.logits[head, "tfidf"]
        for source, rows, weak_negatives in judging_sources(design, head, in_chats=in_chats):
            told["combined"] = mixed(design, kept, head, probe_share(design, head, kept, without=source))
            scored = {c: told[c][rows] for c in COLUMNS}
            truth = y[rows]
            resampled = _resampled_auroc(truth, scored)
            result.append(
                Figure(
                    domain=head[0],
                    head=head[1],
                    source=source,
                    in_chats=in_chats,
                    lang="/".join(sorted({design.rows[i].lang for i in np.flatnonzero(rows)})),
                    positives=int((truth == 1).sum()),
                    negatives=int((truth == 0).sum()),
                    weak_negatives=weak_negatives,
                    auroc={c: round(float(roc_auc_score(truth, s)), 4) for c, s in scored.items()},
                    auroc_interval={c: _interval(x) for c, x in resampled.items()},
                    lead_interval={
                        c: _interval(resampled["combined"] - x) for c, x in resampled.items() if c != "combined"
                    },
                    auprc={c: round(float(average_precision_score(truth, s)), 4) for c, s in scored.items()},
                    tpr_at_1_fpr={c: round(_tpr_at(truth, s, 0.01), 4) for c, s in scored.items()},
                )
            )
    return result


def standings(found: Sequence[Figure]) -> list[Standing]:
    """Against each baseline: TF-IDF and the dense probe. On bare texts."""
    found = [f for f in found if not f.in_chats]
    return [
        Standing(
            baseline=baseline,
            judged=len(found),
            ahead=sum(f.auroc["combined"] >= f.auroc[baseline] for f in found),
            ahead_beyond_chance=sum(f.lead_interval[baseline][0] > 0 for f in found),
            behind_beyond_chance=[
                f"{f.domain}.{f.head.value} on {f.source}" for f in found if f.lead_interval[baseline][1] < 0
            ],
        )
        for baseline in BASELINES
    ]


def judging_sources(design: Design, head: Head, *, in_chats: bool = False) -> list[tuple[str, Bools, bool]]:
    """The sources that can judge a head: name, rows (bare ones or those in chats), and whether negatives are weak."""
    y = design.targets[head]
    result = []
    for source in np.unique(design.source):
        rows = (design.source == source) & (y >= 0) & (design.in_chat == in_chats)
        if source.startswith(OURS):
            continue  # whoever wrote or labelled these wrote what it is fitted on
        strong = rows & ~design.weak
        weak_negatives = bool((strong & (y == 0)).sum() < _LEAST <= (rows & (y == 0)).sum())
        if weak_negatives:
            strong |= rows & (y == 0)
        if min((strong & (y == 1)).sum(), (strong & (y == 0)).sum()) >= _LEAST:
            result.append((str(source), strong, weak_negatives))
    return result


def _resampled_auroc(y: NDArray[np.int8], scored: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """AUROC of every column on bootstrap samples of the rows, positives and negatives apart; the same rows for all."""
    rng = np.random.default_rng(0)
    positive, negative = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    ranks = {column: np.unique(scores, return_inverse=True)[1] for column, scores in scored.items()}
    result = {column: np.zeros(_BOOTSTRAPS) for column in scored}
    for draw in range(_BOOTSTRAPS):
        drawn = [np.bincount(rng.choice(side, len(side)), minlength=len(y)) for side in (positive, negative)]
        for column, rank in ranks.items():
            hits, misses = (np.bincount(rank, weights=weights) for weights in drawn)
            below = np.cumsum(misses) - misses / 2  # negatives under each level; ties count half
            result[column][draw] = hits @ below / (len(positive) * len(negative))
    return result


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
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
    rows = np.flatnonzero(design.taught_by(head, used))
    weights = design.weights(head, used)[rows]
    scaler = TfidfTransformer(sublinear_tf=True).fit(words[rows])  # type: ignore[index]
    model = LogisticRegression(C=10.0, max_iter=200, solver="liblinear")
    model.fit(scaler.transform(words[rows]), y[rows], sample_weight=weights)  # type: ignore[index]
    return np.asarray(model.decision_function(scaler.transform(words[test])))  # type: ignore[index]
