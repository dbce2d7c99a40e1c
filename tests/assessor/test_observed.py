"""Requests that a tap tells of: the verdict is reader mode's on the same tokens, and what is not told is not assessed."""

import itertools

import numpy as np
import pytest

from guard.config import load_config
from guard.errors import ConfigError
from guard.records import Action, Phase
from guard.tap.protocol import Ended, Missed, Step
from tests.assessor.given import LONG, heads, phase_of, scores
from tests.tap.given import BLOCKED, CHAT, HARMLESS, asked, info_of, observed_by, told, verdict_of


@pytest.fixture
def observed(assessor):
    return observed_by(assessor)


@pytest.fixture
def link(assessor, observed):
    return observed.connect(info_of(assessor))


def tell(link, request, cuts, end="stop"):
    for begin, stop in itertools.pairwise(cuts):
        link.take(request.step(begin, stop))
    if end:
        link.take(request.ended(end))


def reasons(verdict):
    return [(m.reason, m.phase) for m in verdict.not_assessed]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    "given",
    [asked(CHAT, HARMLESS), asked(HARMLESS, "Bien sûr 🙂🎉: 好的 面包。"), asked(BLOCKED), asked(HARMLESS, LONG)],
)
def test_the_verdict_is_that_of_reader_mode(assessor, observed, link, given, size):
    request = told(assessor, given)
    tell(link, request, [*range(0, len(request.ids), size), len(request.ids)])
    found, wanted = verdict_of(observed, "r"), assessor.check(given)
    assert scores(found) == pytest.approx(scores(wanted), abs=1e-4)
    assert [p.tokens_read for p in found.phases] == [p.tokens_read for p in wanted.phases]
    assert (found.not_assessed, found.pack, found.policy, found.model) == ((), wanted.pack, wanted.policy, wanted.model)
    for name, head in heads(wanted).items():
        told_of = {a.latent: a.spans for a in heads(found)[name].attributions}
        for a in head.attributions:
            places = [(s.start, s.end, s.message) for s in a.spans]
            assert [(s.start, s.end, s.message) for s in told_of.get(a.latent, a.spans)] == places


def test_rows_that_come_again_change_nothing(assessor, observed, link):
    request = told(assessor, asked(HARMLESS, "It is done."))
    size = len(request.ids)
    for begin, end in ((0, 10), (5, 12), (0, 10), (0, size), (size - 1, size)):
        link.take(request.step(begin, end))
    assert scores(verdict_of(observed, "r")) == pytest.approx(
        scores(assessor.check(asked(HARMLESS, "It is done."))), abs=1e-4
    )


@pytest.mark.parametrize(
    ("begin", "end", "phases"),
    [
        (8, 20, [Phase.PROMPT]),
        (-4, -2, [Phase.COMPLETION]),
        (0, 20, [Phase.PROMPT]),
        (20, -2, [Phase.PROMPT, Phase.COMPLETION]),
    ],
)
def test_a_gap_is_not_assessed_and_other_phases_are(assessor, observed, link, begin, end, phases):
    request = told(assessor, asked(HARMLESS, "It is done now, and the bread is good."))
    size = len(request.ids)
    begin, end = begin % size, end % size
    tell(link, request, [0, begin], end="")
    tell(link, request, [end, size])
    verdict = verdict_of(observed, "r")
    assert verdict.action is Action.NOT_ASSESSED
    assert reasons(verdict) == [("rows_missing", phase) for phase in phases]
    assert f"rows of positions {begin} to {end - 1} never came" in verdict.not_assessed[0].detail
    for phase in Phase:
        assert (phase_of(verdict, phase).action is Action.NOT_ASSESSED) == (phase in phases)


def test_rows_missing_at_the_end_are_missed(assessor, observed, link):
    request = told(assessor, asked(HARMLESS, HARMLESS * 3))
    tell(link, request, [0, len(request.ids) - 1], end="")
    assert verdict_of(observed, "r").action is Action.ALLOW
    link.take(request.ended("stop"))
    assert reasons(verdict_of(observed, "r")) == [("rows_missing", Phase.COMPLETION)]


def test_a_prompt_that_was_not_read_whole_is_not_assessed(assessor, observed, link):
    request = told(assessor, asked(HARMLESS))
    link.take(request.step(0, 12))
    link.take(request.ended("abort", tokens=12))
    assert reasons(verdict_of(observed, "r")) == [("rows_missing", Phase.PROMPT)]


@pytest.mark.parametrize("how", ["aborted", "gone"])
def test_a_prompt_that_never_became_whole_is_not_judged_at_the_end_either(assessor, observed, link, how):
    request = told(assessor, asked(BLOCKED, "No."))
    link.take(request.step(0, request.prompt_tokens - 3))
    if how == "aborted":
        link.take(request.ended("abort", tokens=request.prompt_tokens - 3))
    else:
        link.close()
    verdict = verdict_of(observed, "r")
    assert (verdict.action, {d.action for d in verdict.phases[0].domains}) == ("not_assessed", {"not_assessed"})
    assert reasons(verdict) == [("rows_missing" if how == "aborted" else "tap_lost", Phase.PROMPT)]


def test_that_a_phase_can_be_judged_now_counts_as_a_change(assessor, observed, link):
    request = told(assessor, asked(HARMLESS, "It is done."))
    link.take(request.step(0, 12))
    changes = observed.find("r").changes
    link.take(request.step(12, request.prompt_tokens))
    assert observed.find("r").changes > changes  # from not assessed to allow


def test_missed_rows_and_rows_that_never_began_are_not_assessed(assessor, observed, link):
    request = told(assessor, asked(HARMLESS, "It is done."))
    link.take(
        Step((request.rows(0, len(request.ids) - 2),), (Missed("r", "a step was dropped"), Missed("other", "dropped")))
    )
    assert (reasons(verdict_of(observed, "r")), verdict_of(observed, "r").not_assessed[0].detail) == (
        [("rows_missing", Phase.COMPLETION)],
        "a step was dropped",
    )
    assert verdict_of(observed, "other").action is Action.NOT_ASSESSED
    link.take(Step(ended=(Ended("third", "stop", 9), Ended("fourth", "abort", 0))))
    assert [verdict_of(observed, name).action for name in ("third", "fourth")] == ["not_assessed", "not_assessed"]


def test_another_request_of_the_same_id_cannot_pass_as_the_first(assessor, observed, link):
    link.take(told(assessor, asked(HARMLESS)).step(0, 30))
    link.take(told(assessor, asked(BLOCKED)).step(0, 40))
    verdict = verdict_of(observed, "r")
    assert verdict.action is Action.NOT_ASSESSED
    assert {m.detail for m in verdict.not_assessed} == {"another request of the same id came while this one was open"}


def test_an_id_may_serve_again_once_its_request_has_ended(assessor, observed, link):
    for given in (asked(BLOCKED), asked(HARMLESS)):
        request = told(assessor, given)
        tell(link, request, [0, len(request.ids)])
        assert verdict_of(observed, "r").action == assessor.check(given).action


def test_activations_that_are_not_finite_are_not_assessed(assessor, observed, link):
    request = told(assessor, asked(HARMLESS, "It is done."))
    half = request.prompt_tokens
    link.take(request.step(0, half))
    nothing = {"token": np.empty(0, np.int32), "row": np.empty(0, np.int32), "value": np.empty(0, np.float32)}
    link.take(Step((request.rows(half, len(request.ids), finite=False, **nothing),)))
    assert reasons(verdict_of(observed, "r")) == [("non_finite", Phase.COMPLETION)]


def test_a_block_stays_one_whatever_cannot_be_read_behind_it(assessor, observed, link):
    request = told(assessor, asked(HARMLESS, f"{BLOCKED} {BLOCKED}"))
    end = len(request.ids)
    link.take(request.step(0, end - 1))
    blocked = verdict_of(observed, "r").phases[1]
    assert blocked.action is Action.BLOCK
    changes = observed.find("r").changes
    nothing = {"token": np.empty(0, np.int32), "row": np.empty(0, np.int32), "value": np.empty(0, np.float32)}
    link.take(Step((request.rows(end - 1, end, finite=False, **nothing),)))
    assert observed.find("r").changes > changes  # whoever follows is told
    for ended in ((), (Ended("r", "stop", end),)):
        link.take(Step(ended=ended))
        verdict = verdict_of(observed, "r")
        assert (verdict.action, verdict.phases[1].action) == ("block", "block")
        assert reasons(verdict) == [("non_finite", Phase.COMPLETION)]
        acted = {d.domain for d in blocked.domains if d.action is Action.BLOCK}
        assert {d.domain for d in verdict.phases[1].domains if d.action is Action.BLOCK} == acted


def test_the_first_tokens_of_an_answer_are_news_since_nobody_has_judged_them(assessor, observed, link):
    request = told(assessor, asked(HARMLESS, "It is done."))
    link.take(request.step(0, request.prompt_tokens))
    assert verdict_of(observed, "r").action is Action.ALLOW
    changes = observed.find("r").changes
    link.take(request.step(request.prompt_tokens, request.prompt_tokens + 1))
    assert verdict_of(observed, "r").action is Action.NOT_ASSESSED
    assert observed.find("r").changes > changes


@pytest.mark.parametrize(("which", "off"), [("row", 100_000), ("row", -100_000), ("token", 1_000), ("token", -1)])
def test_hits_that_cannot_be_spoil_their_own_request_alone(assessor, observed, link, which, off):
    good, bad = told(assessor, asked(HARMLESS), "good"), told(assessor, asked(HARMLESS), "bad")
    rows = bad.rows(0, len(bad.ids))
    link.take(Step((bad.rows(0, len(bad.ids), **{which: getattr(rows, which) + off}), good.rows(0, len(good.ids)))))
    assert (verdict_of(observed, "good").action, verdict_of(observed, "bad").action) == ("allow", "not_assessed")


def test_two_taps_that_bring_rows_of_one_request_are_both_told_to_stop_it_once(assessor, observed, link):
    other = observed.connect(info_of(assessor))
    request = told(assessor, asked(BLOCKED, LONG))
    link.take(request.step(0, 20))
    other.take(request.step(0, request.prompt_tokens))  # as a hedged request's: the same tokens on another engine
    assert (link.stops_to_send(), other.stops_to_send()) == (["r"], ["r"])
    third = observed.connect(info_of(assessor))  # such as the first one's, which was cut off and has come again
    third.take(request.step(0, 8))
    assert third.stops_to_send() == ["r"]
    other.take(request.step(request.prompt_tokens, request.prompt_tokens + 4))
    assert (link.stops_to_send(), other.stops_to_send()) == ([], [])
    link.take(request.ended("guard"))
    assert (link.stops, other.stops) == (set(), set())


def test_a_block_stops_the_request_until_it_has_ended_and_is_never_taken_back(assessor, observed, link):
    request = told(assessor, asked(HARMLESS, f"{BLOCKED} {HARMLESS * 6}"))
    for begin in range(len(request.ids)):
        link.take(request.step(begin, begin + 1))
        if link.stops:
            break
    assert (link.stops, begin >= request.prompt_tokens) == ({"r"}, True)
    tell(link, request, [begin + 1, len(request.ids)], end="")
    verdict = verdict_of(observed, "r")
    assert verdict.action is Action.BLOCK
    violence = heads(verdict)[Phase.COMPLETION, "violence", "harm"]
    assert violence.score < violence.block_at  # by now: what came later thinned it out
    link.take(request.ended())
    assert not link.stops
    assert verdict_of(observed, "r").action is Action.BLOCK


def test_a_completion_is_judged_from_enough_tokens_on_or_at_its_end(assessor, observed, link):
    # Word by word, the beginning of a harmless text looks like many things: heads are calibrated on whole ones.
    least = load_config().taps.least_tokens
    short = told(assessor, asked(HARMLESS, "I will kill the process."), "short")
    whole = len(short.ids)
    assert whole - short.prompt_tokens < least
    for begin in range(whole):
        link.take(short.step(begin, begin + 1))
    running = verdict_of(observed, "short")
    assert (running.action, phase_of(running, Phase.COMPLETION).action) == ("not_assessed", "not_assessed")
    assert reasons(running) == [("too_few_read", Phase.COMPLETION)]
    assert not link.stops
    link.take(short.ended())
    ended, wanted = verdict_of(observed, "short"), assessor.check(asked(HARMLESS, "I will kill the process."))
    assert (ended.action, ended.not_assessed) == (wanted.action, ())
    assert scores(ended) == pytest.approx(scores(wanted), abs=1e-4)


@pytest.mark.parametrize(("stop", "stopped"), [([], False), (["completion"], False), (["prompt"], True)])
def test_the_settings_say_which_phases_block_stops(assessor, stop, stopped):
    observed = observed_by(assessor, stop=stop)
    link = observed.connect(info_of(assessor))
    request = told(assessor, asked(BLOCKED))
    link.take(request.step(0, len(request.ids) - 2))
    assert not link.stops  # a prompt is judged once it is whole
    begun = verdict_of(observed, "r")
    assert (begun.action, reasons(begun)) == ("not_assessed", [("too_few_read", Phase.PROMPT)])
    assert heads(begun)[Phase.PROMPT, "violence", "harm"].score > 0.5  # scores are shown as they are
    link.take(request.step(len(request.ids) - 2, len(request.ids)))
    assert link.stops == ({"r"} if stopped else set())
    assert verdict_of(observed, "r").action is Action.BLOCK


def test_a_tap_that_goes_away_leaves_its_open_requests_not_assessed(assessor, observed, link):
    done, left = told(assessor, asked(HARMLESS), "done"), told(assessor, asked(HARMLESS, "It is"), "left")
    tell(link, done, [0, len(done.ids)])
    link.take(left.step(0, len(left.ids)))
    link.close()
    assert verdict_of(observed, "done").action is Action.ALLOW
    assert reasons(verdict_of(observed, "left")) == [("tap_lost", Phase.COMPLETION)]
    assert observed.trouble == "a tap of transformers went away with 1 requests open"
    again = observed.connect(info_of(assessor))
    assert observed.trouble  # until it brings rows
    again.take(told(assessor, asked(HARMLESS), "next").step(0, 9))
    assert not observed.trouble


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pack_hash": "0" * 64},
            "pack: found hash 000000000000, expected {hash} (.*): give the engine's tap and this sidecar the same pack",
        ),
        (
            {"hook_points": ("model.layers.1",)},
            "hook points: found model.layers.1, expected model.layers.0, .*: tap the pack's own",
        ),
        (
            {"model": "1" * 64},
            "model: found weights 111111111111, expected .*: serve that model, or set reader.allow_unverified = true",
        ),
        ({"engine": "other"}, "engine: found 'other', expected one of transformers, vllm"),
        (
            {"engine": "vllm", "engine_version": "0.9.1"},
            "vllm: found version 0.9.1, expected 0.32.x: install that, or set taps.allow_untested = true",
        ),
    ],
)
def test_a_tap_that_does_not_fit_is_refused_and_told_what_to_do(assessor, observed, change, message):
    with pytest.raises(ConfigError, match=message.format(hash=assessor.pack.hash[:12])):
        observed.connect(info_of(assessor, **change))
    assert observed.trouble.startswith("a tap was refused: ")


def test_requests_are_bounded_in_number_and_age(assessor):
    observed = observed_by(assessor, sessions=2, keep_seconds=60, idle_seconds=60)
    link = observed.connect(info_of(assessor))

    def age(name):
        observed.find(name).last_used -= 61
        observed.sweep()

    for name in ("a", "b", "c"):
        link.take(told(assessor, asked(HARMLESS), name).step(0, 30))
    assert observed.find("c") is None  # its rows were passed over
    age("a")
    assert reasons(verdict_of(observed, "a")) == [("tap_lost", Phase.PROMPT)]
    assert observed.find("b").finish_reason == ""
    age("a")
    assert observed.find("a") is None
