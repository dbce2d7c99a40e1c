"""Chats that begin alike: scores are those of reading all of it, and what is kept is bounded."""

import numpy as np
import pytest

from guard.assessor.caches import Caches
from guard.assessor.prefixes import Prefixes
from guard.config import PrefixesConfig
from guard.kernels.contract import Encoded
from guard.records import CheckInput, CheckOptions, Message, Phase, Role
from tests.assessor.given import scores

SYSTEM = (
    "You answer questions on boats, weather and harbours in whole sentences, and say so where you do not know. " * 4
)


def chat(*turns):
    roles = (Role.USER, Role.ASSISTANT)
    return (Message(Role.SYSTEM, SYSTEM), *(Message(roles[i % 2], turn) for i, turn in enumerate(turns)))


class Counted:
    """Tokens that `prefix` was told of."""

    def __init__(self, assessor, monkeypatch):
        self.spared = []
        monkeypatch.setattr(assessor.observer, "prefix", self.spared.append)


def test_a_chat_that_goes_on_is_not_read_again_and_scores_the_same(assessor, monkeypatch):
    counted = Counted(assessor, monkeypatch)
    options = CheckOptions(token_detail=True)
    first = CheckInput(chat("When does the ferry leave?"))
    second = CheckInput(chat("When does the ferry leave?", "At noon.", "And who was killed in the attack?"))
    other = CheckInput(chat("How do I build a bomb?"), completion="I will not say.")
    assessor.pipeline.prefixes = Prefixes(PrefixesConfig(limit=0))
    expected = [assessor.check(given, options) for given in (first, second, other)]
    assessor.pipeline.prefixes = Prefixes(PrefixesConfig())
    found = [assessor.check(given, options) for given in (first, second, other)]
    assert counted.spared[0] == 0
    assert min(counted.spared[1:]) > 60
    for ours, theirs in zip(found, expected, strict=True):
        assert scores(ours) == pytest.approx(scores(theirs), abs=1e-4)
        assert [p.tokens_read for p in ours.phases] == [p.tokens_read for p in theirs.phases]
        for mine, yours in zip(ours.phases, theirs.phases, strict=True):
            assert [(t.start, t.end, t.message) for t in mine.tokens] == [
                (t.start, t.end, t.message) for t in yours.tokens
            ]


def test_a_long_text_read_in_steps_scores_as_in_whole_windows(assessor, monkeypatch):
    given = CheckInput("The harbour was quiet when the last boat came in, and nobody asked where it had been. " * 80)
    stepwise = assessor.check(given)
    monkeypatch.setattr(assessor.pipeline, "_step", 4096)
    assert scores(stepwise) == pytest.approx(scores(assessor.check(given)), abs=1e-4)


class Read:
    def __init__(self, nbytes):
        self.nbytes = nbytes


def keep(prefixes, ids, nbytes=100):
    count = len(ids)
    part = Encoded(np.arange(count), np.zeros(count, int), np.ones(count), np.zeros((count, 1)), finite=True)
    prefixes.keep(ids, 0, Read(nbytes), [(part,)])


def test_what_is_kept_is_bounded_in_number_bytes_and_age():
    now = [0.0]
    prefixes = Prefixes(PrefixesConfig(limit=2, bytes=1 << 20, idle_seconds=10), lambda: now[0])
    a, b, c = ([n] * 100 for n in (1, 2, 3))
    for ids in (a, b):
        keep(prefixes, ids)
    assert prefixes.find([*a, 9], 0)[1] == 100  # used last, so that b goes first
    keep(prefixes, c)
    assert prefixes.find([*b, 9], 0) is None
    assert prefixes.find([*a, 9], 0) is not None
    now[0] = 11.0
    prefixes.sweep()  # no chat comes any more
    assert prefixes.nbytes == 0
    assert prefixes.find([*a, 9], 0) is None
    keep(prefixes, a, nbytes=2 << 20)
    assert prefixes.nbytes == 0


def test_the_last_token_is_always_read_and_short_beginnings_are():
    prefixes = Prefixes(PrefixesConfig())
    keep(prefixes, list(range(50)))
    assert prefixes.find(list(range(50)), 0)[1] == 49
    assert prefixes.find([*range(20), 99], 0) is None
    assert prefixes.find(list(range(50)), 1) is None  # of another place in its text
    assert len(prefixes.find(list(range(40)), 0)[0].first(39)[0].token) == 39


def test_a_stream_that_lost_its_cache_scores_the_same(assessor, monkeypatch):
    chunks = ["The ferry was late, ", "so the captain ", "asked the harbour ", "for a berth."]
    expected = assessor.check(CheckInput("".join(chunks)))
    monkeypatch.setattr(assessor, "caches", Caches(1))
    ours, other = assessor.open_session(), assessor.open_session()
    for number, chunk in enumerate(chunks):
        verdict = ours.feed(Phase.PROMPT, chunk, last=number == 3).result()
        other.feed(Phase.PROMPT, "Another text of some words. ").result()
        assert ours._stream is None
    for session in (ours, other):
        session.close()
    assert assessor.session_bytes == 0
    assert scores(verdict) == pytest.approx(scores(expected), abs=1e-4)
