"""What a stream comes to: the severest of its verdicts, whatever the last one says."""

from dataclasses import replace

import pytest

from guard.records import Action, Phase
from guard.service.outcome import Outcome
from tests.cli.given import domain, head, phase, verdict

ALLOW, FLAG, BLOCK, NOT_ASSESSED = Action.ALLOW, Action.FLAG, Action.BLOCK, Action.NOT_ASSESSED


def running(action, score=0.1, kind=Phase.PROMPT):
    """A stream's verdict on one phase; one that was not assessed has no domains."""
    domains = [] if action is NOT_ASSESSED else [domain(action=action, heads=[head(score=score)])]
    return verdict(phase(domains, kind, action), action=action)


@pytest.mark.parametrize(
    ("said", "comes_to"),
    [
        ([BLOCK, ALLOW], BLOCK),
        ([ALLOW, FLAG, ALLOW], FLAG),
        ([NOT_ASSESSED, ALLOW], ALLOW),  # the first words were held
        ([FLAG, NOT_ASSESSED, ALLOW], FLAG),
        ([ALLOW, NOT_ASSESSED], NOT_ASSESSED),  # unknown is never allow
        ([BLOCK, NOT_ASSESSED], BLOCK),
    ],
)
def test_a_stream_comes_to_its_severest_verdict(said, comes_to):
    outcome = Outcome()
    for action in said:
        found = outcome.add(running(action))
    assert (found.action, found.phases[0].action) == (comes_to, comes_to)


def test_each_domain_keeps_its_severest_action_and_its_last_score():
    outcome = Outcome()
    outcome.add(running(BLOCK, score=0.95))
    (judged,) = outcome.add(running(ALLOW, score=0.2)).phases[0].domains
    assert (judged.action, judged.heads[0].score) == (BLOCK, 0.2)
    (judged,) = outcome.add(running(NOT_ASSESSED)).phases[0].domains
    assert (judged.action, judged.heads[0].score) == (BLOCK, 0.2)


def test_a_phase_is_judged_by_its_own_verdicts():
    outcome = Outcome()
    prompt = running(FLAG)
    outcome.add(prompt)
    both = replace(prompt, phases=(*prompt.phases, *running(ALLOW, kind=Phase.COMPLETION).phases))
    assert [p.action for p in outcome.add(both).phases] == [FLAG, ALLOW]


def test_a_verdict_without_phases_forgets_nothing():
    outcome = Outcome()
    outcome.add(running(BLOCK))
    found = outcome.add(verdict(action=NOT_ASSESSED))
    assert (found.action, [p.action for p in found.phases]) == (BLOCK, [BLOCK])
