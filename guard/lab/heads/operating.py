"""Operating figures: what the finished heads do at their thresholds, and whether their scores are probabilities.

All on rows that the fold of their group had not seen. A head's temperature and shift are two numbers fitted on such
rows, and its thresholds lie where a share of them would be flagged; what ends in `_unseen` fits and cuts without the
group that it judges too, so that nothing of it is known.
"""

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from guard.lab.heads.calibrate import FLAG_FPR, CalibratedHead, cut, source_weights
from guard.lab.heads.evaluate import OutOfFold, mixed
from guard.lab.heads.fit import HEADS, Design, calibrate
from guard.records import HeadKind

BINS = 15  # of equal mass

Floats = NDArray[np.float64]


class Operating(BaseModel):
    """One head. Shares are weighted by source, as calibration is; ECE and Brier likewise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    domain: str
    head: HeadKind
    probe_share: float  # of the combined head's logit, before the temperature
    latents: int
    positives: int
    negatives: int
    caught: float | None  # positives at flag_at or above; None for a head that does not flag
    flagged: float | None  # negatives likewise
    flagged_in_chats: float | None  # of the negatives, those in chats; None where there are none
    caught_unseen: float | None  # at a threshold that the group had no say in
    flagged_unseen: float | None
    ece: float
    ece_unseen: float
    brier: float


def operating(design: Design, kept: OutOfFold, heads: list[CalibratedHead]) -> list[Operating]:
    result = []
    for head, finished in zip(HEADS, heads, strict=True):
        y, logits = design.targets[head], mixed(design, kept, head, finished.probe_share)
        seen = ~np.isnan(logits) & (y >= 0) & design.usable & ~design.weak
        weights = source_weights(design, y, seen)
        scores = sigmoid((logits + finished.shift) / finished.section.temperature)
        flag_at = finished.section.flag_at
        above, cut_unseen = _above_unseen(design, logits, y, seen, weights)
        result.append(
            Operating(
                domain=head[0],
                head=head[1],
                probe_share=finished.probe_share,
                latents=len(finished.model.latents),
                positives=int((seen & (y == 1)).sum()),
                negatives=int((seen & (y == 0)).sum()),
                caught=None if flag_at is None else _share(scores >= flag_at, weights, seen & (y == 1)),
                flagged=None if flag_at is None else _share(scores >= flag_at, weights, seen & (y == 0)),
                flagged_in_chats=None
                if flag_at is None or not (in_chats := seen & (y == 0) & design.in_chat).any()
                else _share(scores >= flag_at, weights, in_chats),
                caught_unseen=None if flag_at is None else _share(above, weights, cut_unseen & (y == 1)),
                flagged_unseen=None if flag_at is None else _share(above, weights, cut_unseen & (y == 0)),
                ece=ece(scores[seen], y[seen], weights[seen]),
                ece_unseen=ece(_unseen(design, logits, y, seen)[seen], y[seen], weights[seen]),
                brier=round(float(np.average((scores[seen] - y[seen]) ** 2, weights=weights[seen])), 4),
            )
        )
    return result


def prose_flagged(design: Design, kept: OutOfFold, heads: list[CalibratedHead]) -> dict[str, dict[str, float]]:
    """Of each source of harmless prose: how many texts, and the share that a harm head flags, by head and by any."""
    found = {}
    for source in np.unique(design.source[design.prose]):
        rows = (design.source == source) & ~design.in_chat
        by_head = {}
        for head, finished in zip(HEADS, heads, strict=True):
            if head[1] is HeadKind.HARM and finished.section.flag_at is not None:
                judged = rows & (design.targets[head] == 0)
                logits = mixed(design, kept, head, finished.probe_share)
                scores = sigmoid((logits + finished.shift) / finished.section.temperature)
                by_head[finished.section.name] = judged & (scores >= finished.section.flag_at)
        shares = {name: round(float(flagged[rows].mean()), 4) for name, flagged in by_head.items()}
        some = np.any(list(by_head.values()), axis=0)
        found[str(source)] = {"texts": int(rows.sum()), **shares, "any": round(float(some[rows].mean()), 4)}
    return found


def ece(scores: Floats, y: NDArray[np.int8], weights: Floats) -> float:
    """Expected calibration error over `BINS` bins of equal weight: the mean distance of score and truth in a bin."""
    order = np.argsort(scores, kind="stable")
    mass = np.cumsum(weights[order]) / weights.sum()
    bins = np.minimum((mass * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bins, weights=(weights * (scores - y))[order], minlength=BINS)
    return round(float(np.abs(gaps).sum() / weights.sum()), 4)


def sigmoid(logits: Floats) -> Floats:
    result: Floats = 1 / (1 + np.exp(-np.clip(logits, -60, 60)))
    return result


def _unseen(design: Design, logits: Floats, y: NDArray[np.int8], seen: NDArray[np.bool_]) -> Floats:
    """Scores of each group, by a temperature and a shift that were fitted on the others."""
    result = np.full(len(y), np.nan)
    for group in np.unique(design.group[seen]):
        others = seen & (design.group != group)
        if len(np.unique(y[others])) < 2:
            others = seen
        temperature, shift = calibrate(logits[others], y[others], source_weights(design, y, others)[others])
        here = seen & (design.group == group)
        result[here] = sigmoid((logits[here] + shift) / temperature)
    return result


def _above_unseen(
    design: Design, logits: Floats, y: NDArray[np.int8], seen: NDArray[np.bool_], weights: Floats
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Rows of each group at or above what `FLAG_FPR` of the other groups' negatives reach; and where there are such."""
    above, known = np.zeros((2, len(y)), dtype=np.bool_)
    for group in np.unique(design.group[seen]):
        others = seen & (y == 0) & (design.group != group)
        here = seen & (design.group == group)
        if others.any():
            known |= here
            above[here] = logits[here] >= cut(logits[others], weights[others], FLAG_FPR)
    return above, known


def _share(flagged: NDArray[np.bool_], weights: Floats, rows: NDArray[np.bool_]) -> float | None:
    return None if not rows.any() else round(float(np.average(flagged[rows], weights=weights[rows])), 4)
