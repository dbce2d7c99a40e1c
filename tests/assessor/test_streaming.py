"""A stream ends where one check of the same text ends, however it is cut."""

import random

import pytest

from guard.records import Action, CheckInput, CheckOptions, Phase
from guard.scoring.pooling import SPANS_KEPT
from tests.assessor.given import CHAT, LONG, TEXTS, cut, heads, phase_of, scores, stream

RANDOM_CUTS = [random.Random(7).randint(1, 12) for _ in range(50)]


def pieces(text, how):
    if how == "words":
        words = text.split(" ")
        return [word + " " for word in words[:-1]] + [words[-1]]
    return cut(text, {"characters": [1], "random": RANDOM_CUTS, "whole": [len(text)]}[how])


def same(streamed, whole):
    assert scores(streamed) == pytest.approx(scores(whole), abs=1e-3)
    assert scores(streamed)
    assert streamed.action == whole.action
    counts = [[(p.phase, p.tokens_read, p.tokens_total) for p in v.phases] for v in (streamed, whole)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("how", ["characters", "words", "random", "whole"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_in_pieces(assessor, text, how):
    same(stream(assessor, prompt=pieces(text, how))[-1], assessor.check(CheckInput(text)))


@pytest.mark.parametrize("how", ["words", "random"])
def test_a_prompt_and_a_completion_in_pieces(assessor, how):
    for prompt, completion in ((TEXTS[2], TEXTS[4]), (TEXTS[4], TEXTS[5]), (TEXTS[6], TEXTS[2])):
        verdicts = stream(assessor, prompt=pieces(prompt, how), completion=pieces(completion, how))
        same(verdicts[-1], assessor.check(CheckInput(prompt, completion)))


@pytest.mark.parametrize("how", ["characters", "words"])
def test_a_chat_and_its_completion_in_pieces(assessor, how):
    verdicts = stream(assessor, chat=CHAT, completion=pieces(TEXTS[1], how))
    same(verdicts[0], assessor.check(CheckInput(CHAT)))
    same(verdicts[-1], assessor.check(CheckInput(CHAT, TEXTS[1])))


def test_a_completion_alone(assessor):
    same(stream(assessor, completion=pieces(TEXTS[2], "random"))[-1], assessor.check(CheckInput(None, TEXTS[2])))


@pytest.mark.parametrize("how", ["words", "random", "whole"])
def test_a_stream_across_many_windows(narrow, how):
    verdicts = stream(narrow, prompt=pieces(LONG, how), completion=pieces(LONG[:400], how))
    same(verdicts[-1], narrow.check(CheckInput(LONG, LONG[:400])))
    assert phase_of(verdicts[-1]).tokens_read > 5 * 64


def test_a_long_stream_within_one_window(assessor):
    same(stream(assessor, prompt=cut(LONG, [400, 3, 200]))[-1], assessor.check(CheckInput(LONG)))


def test_a_chat_across_many_windows(narrow):
    same(stream(narrow, chat=CHAT, completion=pieces(LONG, "random"))[-1], narrow.check(CheckInput(CHAT, LONG)))


def test_attributions_of_a_stream_are_those_of_the_whole_text(assessor):
    options = CheckOptions(max_attributions=5)
    streamed = stream(assessor, prompt=pieces(TEXTS[2], "random"), options=options)[-1]
    whole = heads(assessor.check(CheckInput(TEXTS[2]), options))
    for name, head in heads(streamed).items():
        assert head.explained_share == pytest.approx(whole[name].explained_share, abs=1e-3)
        found = {a.latent: a for a in head.attributions}
        for wanted in whole[name].attributions:
            if wanted.latent in found and len(wanted.spans) < SPANS_KEPT:
                places = [[(s.start, s.end, s.message) for s in a.spans] for a in (found[wanted.latent], wanted)]
                assert places[0] == places[1]


def test_the_last_words_are_held_until_they_are_settled(assessor):
    verdicts = stream(assessor, prompt=["He", " saw the", " man", " there", ""])
    counts = [(v.phases[0].tokens_read, v.phases[0].tokens_total) for v in verdicts]
    assert counts == [(0, 1), (1, 3), (2, 4), (3, 5), (5, 5)]
    assert verdicts[0].action == "not_assessed"
    assert [missing.reason for missing in verdicts[0].not_assessed] == ["nothing_read"]
    assert not verdicts[-1].not_assessed


def test_a_running_verdict_details_the_tokens_of_its_own_chunk(assessor):
    text = TEXTS[1]
    verdicts = stream(assessor, prompt=pieces(text, "words"), options=CheckOptions(token_detail=True))
    spans = [(token.start, token.end) for v in verdicts for token in v.phases[0].tokens]
    whole = assessor.check(CheckInput(text), CheckOptions(token_detail=True))
    assert spans == [(token.start, token.end) for token in whole.phases[0].tokens]


def test_no_token_is_read_twice(assessor, hooked):
    read = []
    with hooked(assessor, lambda _module, _inputs, output: read.append(output.shape[1])):
        verdicts = stream(assessor, prompt=pieces(TEXTS[1], "characters"), completion=pieces(TEXTS[3], "words"))
    assert sum(read) == sum(p.tokens_read for p in verdicts[-1].phases) + 1  # and the sink in front


def test_a_stream_without_word_boundaries_is_judged_as_it_goes(assessor):
    text = "今天天气很好我们一起去公园散步然后回家吃饭看书休息" * 3
    verdicts = stream(assessor, completion=cut(text, [5]))
    counts = [(p.tokens_read, p.tokens_total) for v in verdicts for p in v.phases]
    assert all(total - read <= 20 for read, total in counts)
    assert all(v.action is not Action.NOT_ASSESSED for v in verdicts[4:])
    same(verdicts[-1], assessor.check(CheckInput(None, text)))


def test_only_whitespace_is_not_assessed_until_a_word_is_read(assessor):
    verdicts = stream(assessor, prompt=["  \n\n \n", " \n ", "\n\n He", " saw", " the man"])
    assert [v.action is Action.NOT_ASSESSED for v in verdicts] == [
        True,
        True,
        True,
        True,
        False,
    ]  # the last two words are held
    said = [(m.reason, m.detail) for v in verdicts for m in v.not_assessed]
    assert said[-1] == ("nothing_read", "only whitespace has been read yet")
    assert {reason for reason, _ in said} == {"nothing_read"}
    (ended,) = stream(assessor, prompt=[" \n\t "])
    assert (ended.action, ended.phases[0].action, ended.phases[0].domains) == ("not_assessed", "not_assessed", ())
    blank = stream(assessor, prompt=[TEXTS[0]], completion=["  \n", " "])[-1]
    assert [p.action for p in blank.phases] == ["allow", "not_assessed"]
    assert blank.action == "not_assessed"


def test_an_empty_stream_is_not_assessed(assessor):
    (verdict,) = stream(assessor, prompt=[""])
    assert (verdict.action, verdict.phases) == ("not_assessed", ())
    assert [(m.reason, m.detail) for m in verdict.not_assessed] == [("nothing_read", "no token has been read yet")]


def test_two_streams_side_by_side_do_not_touch(assessor):
    texts = [TEXTS[1], TEXTS[4]]
    sessions = [assessor.open_session() for _ in texts]
    futures = []
    for ours, theirs in zip(*(cut(text.ljust(80), [5]) for text in texts), strict=False):
        futures = [s.feed(Phase.PROMPT, c) for s, c in zip(sessions, (ours, theirs), strict=True)]
    futures = [s.feed(Phase.PROMPT, "", last=True) for s in sessions]
    for future, text in zip(futures, texts, strict=True):
        same(future.result(60), assessor.check(CheckInput(text.ljust(80)[:80])))
    for session in sessions:
        session.close()
