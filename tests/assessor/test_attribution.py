"""A logit splits exactly into its parts: of latents, of tokens, of the probe."""

import math

import pytest

from guard.records import CheckInput, CheckOptions
from guard.scoring.pooling import SPANS_KEPT
from tests.assessor.given import CHAT, LONG, TEXTS, heads

INPUTS = [*map(CheckInput, [*TEXTS, LONG]), CheckInput(CHAT, "It is on Sunday."), CheckInput(None, TEXTS[4])]


@pytest.mark.parametrize("wanted", [0, 1, 5, 100])
def test_attributions_add_up_to_the_logit_and_the_score_is_its_sigmoid(assessor, wanted):
    for given in INPUTS:
        for head in heads(assessor.check(given, CheckOptions(max_attributions=wanted))).values():
            total = head.bias + sum(a.contribution for a in head.attributions) + head.rest
            assert total == pytest.approx(head.logit, abs=1e-4)
            assert head.score == pytest.approx(1 / (1 + math.exp(-head.logit)), abs=1e-12)
            assert sum(a.latent is not None for a in head.attributions) <= wanted
            assert wanted or not head.attributions
            assert 0 <= head.explained_share <= 1


def test_with_every_latent_shown_nothing_rests(assessor):
    shown = 0
    for given in INPUTS:
        for head in heads(assessor.check(given, CheckOptions(max_attributions=100))).values():
            latents = [a for a in head.attributions if a.latent is not None]
            if len(latents) < 100:
                assert head.rest == pytest.approx(0, abs=1e-4)
                assert sum(a.share for a in head.attributions) == pytest.approx(1 if head.attributions else 0, abs=1e-6)
            sizes = [abs(a.contribution) for a in latents]
            assert sizes == sorted(sizes, reverse=True)
            shown += len(latents)
    assert shown


def test_the_answer_is_the_same_however_many_attributions_are_shown(assessor):
    few, many = (assessor.check(CheckInput(LONG), CheckOptions(max_attributions=n)) for n in (0, 100))
    assert few.action == many.action
    for name, head in heads(few).items():
        assert head.logit == pytest.approx(heads(many)[name].logit, abs=1e-9)
        assert head.explained_share == pytest.approx(heads(many)[name].explained_share, abs=1e-9)


@pytest.mark.parametrize("given", INPUTS)
def test_tokens_add_up_to_the_logit(assessor, given):
    verdict = assessor.check(given, CheckOptions(token_detail=True))
    for phase in verdict.phases:
        assert len(phase.tokens) == phase.tokens_read
        for domain in phase.domains:
            for head in domain.heads:
                parts = [token.contributions[f"{domain.domain}.{head.head}"] for token in phase.tokens]
                assert head.bias + sum(parts) == pytest.approx(head.logit, abs=1e-4)


@pytest.mark.parametrize("given", INPUTS)
def test_a_latents_spans_add_up_to_its_contribution_unless_there_are_too_many_to_show(assessor, given):
    for head in heads(assessor.check(given, CheckOptions(max_attributions=100))).values():
        for shown in head.attributions:
            if shown.latent is None or len(shown.spans) == SPANS_KEPT:
                continue
            assert sum(span.contribution for span in shown.spans) == pytest.approx(shown.contribution, abs=1e-6)


def test_only_the_domains_asked_for_are_judged_and_detailed(assessor):
    chosen = assessor.pack.domains[-1]
    verdict = assessor.check(CheckInput(TEXTS[1]), CheckOptions(domains=(chosen, chosen), token_detail=True))
    (phase,) = verdict.phases
    assert [domain.domain for domain in phase.domains] == [chosen]
    assert {name.rpartition(".")[0] for token in phase.tokens for name in token.contributions} == {chosen}
