"""Calibration error worked out by hand, and what a verdict's attributions are worth."""

import numpy as np
import pytest

from guard.lab.heads.faithful import named_by, without
from guard.lab.heads.operating import ece
from guard.records import Attribution, LatentId, SpanContribution


def test_scores_that_are_the_truth_s_share_have_no_calibration_error():
    scores = np.repeat([0.2, 0.8], 500)
    y = np.concatenate([np.tile([1, 0, 0, 0, 0], 100), np.tile([1, 1, 1, 1, 0], 100)]).astype(np.int8)
    assert ece(scores, y, np.ones(1000)) == pytest.approx(0, abs=0.02)


def test_a_score_that_says_too_much_is_off_by_what_it_says_too_much():
    y = np.tile([1, 0], 300).astype(np.int8)
    assert ece(np.full(600, 0.9), y, np.ones(600)) == pytest.approx(0.4, abs=0.01)
    weights = np.where(y == 1, 4.0, 1.0)  # four of five by weight are positive
    assert ece(np.full(600, 0.9), y, weights) == pytest.approx(0.1, abs=0.01)


def attribution(contribution, *spans, latent=1):
    return Attribution(
        latent=LatentId("model.layers.1", latent) if latent else None,
        name="",
        tags=(),
        contribution=contribution,
        share=0.1,
        peak_activation=1.0,
        spans=tuple(SpanContribution(start, end, 0.1) for start, end in spans),
    )


def test_the_tokens_that_the_strongest_latents_name_are_cut_out():
    text = "I will smash your skull"
    found = [
        attribution(-2.0, (0, 1)),  # speaks against
        attribution(1.0, (7, 12), (18, 23), latent=2),
        attribution(0.5, (2, 6), latent=3),
        attribution(3.0, latent=None),  # the dense probe names no token
    ]
    assert named_by(found, 1) == {(7, 12), (18, 23)}
    assert without(text, named_by(found, 1)) == "I will  your "
    assert without(text, named_by(found, 5)) == "I   your "
    assert without(text, frozenset()) == text
