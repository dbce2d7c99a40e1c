"""Calibrate: the heads that ship, their temperature, bias and thresholds from rows that their folds had not seen."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from guard.lab.heads.evaluate import OutOfFold, mixed, probe_share
from guard.lab.heads.fit import HEADS, WEAK_WEIGHT, Design, Linear, calibrate, choose_latents, fit_head, mix
from guard.pack.manifest import HeadSection
from guard.records import HeadKind

# Flag and block where these shares of harmless rows, weighted by source, would be hit; presence alone never blocks.
FLAG_FPR = 0.02
BLOCK_FPR = 0.002


@dataclass(frozen=True)
class CalibratedHead:
    section: HeadSection
    model: Linear
    probe_share: float  # of the probe in the mix
    shift: float  # that calibration added to the bias


def fit_all(design: Design, kept: OutOfFold) -> list[CalibratedHead]:
    """The heads that ship: fitted on all rows but the look-alikes, calibrated on rows that their folds had not seen.

    Texts in chats calibrate as bare ones do, so that thresholds fit both.
    """
    chosen = choose_latents(design, design.fitted_on)
    heads = []
    for head in HEADS:
        share = probe_share(design, head, kept)
        latents = fit_head(design, head, design.fitted_on, chosen[head[0]], "latents")
        model = mix(latents, fit_head(design, head, design.fitted_on, chosen[head[0]], "probe"), share)
        logits, y = mixed(design, kept, head, share), design.targets[head]
        seen = ~np.isnan(logits) & (y >= 0) & design.usable
        weights = source_weights(design, y, seen)
        temperature, shift = calibrate(logits[seen], y[seen], weights[seen])
        scores = expit((logits + shift) / temperature)
        negative = seen & (y == 0) & ~design.weak
        flag_at = cut(scores[negative], weights[negative], FLAG_FPR)
        block_at = cut(scores[negative], weights[negative], BLOCK_FPR)
        flags = head[1] is HeadKind.HARM or head[0] == "politics"  # politics has no harm head: presence speaks for it
        heads.append(
            CalibratedHead(
                HeadSection(
                    domain=head[0],
                    head=head[1],
                    bias=model.bias + shift,
                    temperature=temperature,
                    flag_at=_threshold(flag_at) if flags else None,
                    block_at=_threshold(max(block_at, flag_at)) if head[1] is HeadKind.HARM else None,
                ),
                model,
                share,
                shift,
            )
        )
    return heads


def source_weights(design: Design, y: NDArray[np.int8], seen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Every source counts by the root of its size, at its own share of positives."""
    weights = np.zeros(len(y))
    for source in np.unique(design.source[seen]):
        part = seen & (design.source == source)
        weights[part] = 1 / np.sqrt(part.sum())
    return weights * np.where(design.weak, WEAK_WEIGHT, 1.0)


def _threshold(score: float) -> float:
    """To four digits, and never 0, which would flag all: where a head parts its rows well, negatives lie that low."""
    return max(round(score, 4), 0.0001)


def cut(scores: NDArray[np.float64], weights: NDArray[np.float64], share: float) -> float:
    """The highest score at which, or above it, `share` of the weight lies: one row more than below that share."""
    order = np.argsort(-scores)
    behind = np.cumsum(weights[order]) / weights.sum()
    return float(scores[order][np.searchsorted(behind, share)])


def weight_matrices(
    rows: NDArray[np.int64], heads: Sequence[CalibratedHead], hook_points: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`head_weights [H, K]`, and `probe_weights [H, P]`: a head reads its own probe row at every hook point."""
    head_weights = np.zeros((len(heads), len(rows)), dtype=np.float32)
    for place, head in enumerate(heads):
        head_weights[place, np.searchsorted(rows, head.model.latents)] = head.model.latent_weights
    probe_weights = np.tile(np.eye(len(heads), dtype=np.float32), (1, hook_points))
    return head_weights, probe_weights
