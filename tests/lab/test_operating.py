"""Shares at the thresholds and calibration error worked out by hand, and what a verdict's attributions are worth."""

import numpy as np
import pytest

from guard.lab.heads.calibrate import CalibratedHead
from guard.lab.heads.faithful import named_by, without
from guard.lab.heads.fit import HEADS, Linear
from guard.lab.heads.operating import ece, operating, prose_flagged
from guard.pack.manifest import HeadSection
from guard.records import Attribution, HeadKind, LatentId, SpanContribution
from tests.lab.given import design_of, labelled_row, out_of_fold


def test_scores_that_are_the_truth_s_share_have_no_calibration_error():
    scores = np.repeat([0.2, 0.8], 500)
    y = np.concatenate([np.tile([1, 0, 0, 0, 0], 100), np.tile([1, 1, 1, 1, 0], 100)]).astype(np.int8)
    assert ece(scores, y, np.ones(1000)) == pytest.approx(0, abs=0.02)


def test_a_score_that_says_too_much_is_off_by_what_it_says_too_much():
    y = np.tile([1, 0], 300).astype(np.int8)
    assert ece(np.full(600, 0.9), y, np.ones(600)) == pytest.approx(0.4, abs=0.01)
    weights = np.where(y == 1, 4.0, 1.0)  # four of five by weight are positive
    assert ece(np.full(600, 0.9), y, weights) == pytest.approx(0.1, abs=0.01)


def finished(head, flag_at):
    """Scores are `sigmoid((logit + 1) / 2)` of a mixture that is a quarter probe."""
    section = HeadSection(domain=head[0], head=head[1], bias=0.0, temperature=2.0, flag_at=flag_at, block_at=None)
    nothing = Linear(np.array([3, 5]), np.zeros(2), np.zeros(1), bias=0.0)
    return CalibratedHead(section, nothing, probe_share=0.25, shift=1.0)


def test_what_is_caught_and_flagged_is_weighted_by_source():
    # Rows of the source of four weigh a half each, that of the other 1.
    rows = [
        labelled_row("four", 0, harmful=True),
        labelled_row("four", 1, harmful=True),
        labelled_row("four", 2),
        labelled_row("four", 3, frame="prompt"),
        labelled_row("one", 0, frame="completion"),
        labelled_row("four", 4, weak=True),  # none of these is judged: noisy,
        labelled_row("four", 5, harmful=True),  # never held out,
        labelled_row("lookalike_terror", 0),  # kept for other figures,
        labelled_row("foreign", 0),  # or of a source that heads may not be fitted on
    ]
    mixed = np.array([1.0, -3, 1, -3, 1, 1, np.nan, 1, 1])  # scores sigmoid(1) and sigmoid(-1)
    latents, probe = dict.fromkeys(HEADS, mixed - 1), dict.fromkeys(HEADS, mixed + 3)
    heads = [finished(head, None if number == 1 else 0.5) for number, head in enumerate(HEADS)]
    found = operating(design_of(rows, sources=("four", "one")), out_of_fold(latents, probe), heads)
    assert [(o.domain, o.head) for o in found] == list(HEADS)
    first = found[0]
    assert (first.probe_share, first.latents, first.positives, first.negatives) == (0.25, 2, 2, 3)
    assert first.caught == 0.5
    assert first.flagged == 0.75  # a half and 1 of 2
    assert first.flagged_in_chats == 0.6667  # 1 of a half and 1
    right, wrong = (1 - 1 / (1 + np.exp(-1))) ** 2, (1 / (1 + np.exp(-1))) ** 2
    assert first.brier == pytest.approx((0.5 * right + 0.5 * wrong + 0.5 * wrong + 0.5 * right + wrong) / 3, abs=1e-4)
    silent = found[1]
    assert (silent.caught, silent.flagged, silent.flagged_in_chats) == (None, None, None)
    assert silent.brier == first.brier


def test_a_threshold_of_other_sources_alone_says_what_is_flagged_where_nothing_is_known():
    rows = [labelled_row(name, i, harmful=i % 2 == 0) for name in ("mild", "harsh") for i in range(4)]
    logits = dict.fromkeys(HEADS, np.array([1.0, -3, 1, -3, 3, 1, 3, 1]))
    found = operating(design_of(rows), out_of_fold(logits, logits), [finished(head, 0.85) for head in HEADS])
    assert {(o.caught, o.flagged) for o in found} == {(0.5, 0.0)}  # sigmoid(2) is above, sigmoid(1) below
    # What is harmless in the harsh source lies above all of the mild one's; its own lie above what cuts the mild.
    assert {(o.caught_unseen, o.flagged_unseen) for o in found} == {(1.0, 0.5)}
    heads = [finished(head, None) for head in HEADS]
    found = operating(design_of(rows), out_of_fold(logits, logits), heads)
    assert {(o.caught_unseen, o.flagged_unseen) for o in found} == {(None, None)}


def test_prose_that_a_harm_head_flags_is_counted_by_source_as_it_stands_bare():
    rows = [
        *(labelled_row("annotated_gutenberg", i) for i in range(4)),
        labelled_row("annotated_gutenberg", 4, frame="prompt"),
        labelled_row("other", 0),
    ]
    logits = {head: np.array([3.0, -3, -3, -3, 3, 3]) for head in HEADS}
    logits["terror", HeadKind.HARM] = np.array([3.0, 3, -3, -3, 3, 3])
    logits["politics", HeadKind.PRESENCE] = np.full(6, 3.0)
    found = prose_flagged(design_of(rows), out_of_fold(logits, logits), [finished(head, 0.5) for head in HEADS])
    shares = {"pornography.harm": 0.25, "violence.harm": 0.25, "terror.harm": 0.5, "any": 0.5}
    assert found == {"annotated_gutenberg": {"texts": 4, **shares}}


def test_without_harmless_texts_in_chats_nothing_is_said_of_them():
    rows = [labelled_row("one", i, harmful=i % 2 == 0, frame="prompt" if i == 0 else "text") for i in range(4)]
    logits = dict.fromkeys(HEADS, np.array([1.0, 1, -3, -3]))
    found = operating(design_of(rows), out_of_fold(logits, logits), [finished(head, 0.5) for head in HEADS])
    assert {(o.caught, o.flagged, o.flagged_in_chats) for o in found} == {(0.5, 0.5, None)}


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
