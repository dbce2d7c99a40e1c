"""Many callers at once: the same answers, bounded queues, places that come free again."""

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from guard.assessor import Observer
from guard.errors import Exhausted, InvalidInput, SessionExpired
from guard.reader.model import TorchReader
from guard.records import CheckInput, CheckOptions, Phase
from tests.assessor.given import CHAT, LONG, TEXTS, phase_of, scores, stream


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sixteen_callers_get_the_answers_of_one(assessor):
    given = [*map(CheckInput, [*TEXTS, LONG]), CheckInput(CHAT, TEXTS[1])] * 3
    wanted = {g: scores(assessor.check(g)) for g in set(given)}
    with ThreadPoolExecutor(16) as callers:
        found = list(callers.map(assessor.check, given))
    for one, verdict in zip(given, found, strict=True):
        assert scores(verdict) == pytest.approx(wanted[one], abs=1e-4)


def test_streams_and_checks_share_the_reader(assessor):
    wanted = scores(assessor.check(CheckInput(TEXTS[1])))
    with ThreadPoolExecutor(8) as callers:
        streams = [callers.submit(stream, assessor, prompt=TEXTS[1].split(" ")) for _ in range(3)]
        checks = [callers.submit(assessor.check, CheckInput(TEXTS[1])) for _ in range(8)]
        for check in checks:
            assert scores(check.result(120)) == pytest.approx(wanted, abs=1e-4)
        wanted = scores(assessor.check(CheckInput(TEXTS[1].replace(" ", ""))))
        for streamed in streams:
            assert scores(streamed.result(120)[-1]) == pytest.approx(wanted, abs=1e-3)


class Batches(Observer):
    """The number of sequences in each batch."""

    def __init__(self):
        self.sizes = []

    def batch(self, sequences, tokens, seconds):
        self.sizes.append(sequences)


@pytest.mark.parametrize(
    ("texts", "sizes"),
    [
        ([TEXTS[1]] * 16, [16]),
        # A short text is not padded to the length of a long one, which is read in three steps.
        ([TEXTS[1], LONG, TEXTS[2], TEXTS[0]], [3, 1, 1, 1]),
    ],
)
def test_requests_that_wait_share_a_batch(loading, gated, texts, sizes):
    seen = Batches()
    with loading(observer=seen) as assessor, gated(assessor) as gate:
        first = assessor.submit(CheckInput(TEXTS[0]))
        assert gate.arrived.wait(10)
        others = [assessor.submit(CheckInput(text)) for text in texts]
        until(lambda: len(assessor.batcher._jobs) == len(texts))
        gate.open()
        for future in (first, *others):
            future.result(60)
    assert seen.sizes == [1, *sizes]


def refused(attempt):
    with pytest.raises(Exhausted, match=r"^the reader's queue is full \(3 requests\); try again in \d") as caught:
        attempt()
    assert (caught.value.reason, caught.value.retry_after_s > 0) == ("QUEUE_FULL", True)


def test_a_full_queue_refuses_at_once_and_says_when_to_retry(loading, gated):
    with loading(reader={"queue_size": 3}) as assessor, gated(assessor) as gate:
        futures = [assessor.submit(CheckInput(text)) for text in TEXTS[:3]]
        refused(lambda: assessor.submit(CheckInput("x")))
        assert assessor.queue_depth == 3
        gate.open()
        for future in futures:
            future.result(60)
        until(lambda: assessor.queue_depth == 0)
        assert assessor.check(CheckInput("x")).phases


def test_a_full_queue_does_not_end_a_stream(loading, gated):
    with loading(reader={"queue_size": 3}) as assessor, gated(assessor) as gate:
        session = assessor.open_session()
        futures = [assessor.submit(CheckInput(text)) for text in TEXTS[:3]]
        first = session.feed(Phase.PROMPT, "x ")
        refused(lambda: session.feed(Phase.PROMPT, "y ", last=True))  # only what is fed ahead of its verdicts
        assert assessor.queue_depth == 4
        gate.open()
        assert first.result(60).phases
        # The refused chunk changed nothing: it can be sent again.
        assert phase_of(session.feed(Phase.PROMPT, "y ", last=True).result(60)).tokens_read == 3
        for future in futures:
            future.result(60)
        session.close()


def test_cancelled_texts_cost_those_behind_them_nothing(assessor, monkeypatch):
    opened, tokenized, tokenize = threading.Event(), [], assessor.pipeline.tokenize

    def noting(given):
        opened.wait(30)
        tokenized.append(given.prompt)
        return tokenize(given)

    monkeypatch.setattr(assessor.pipeline, "tokenize", noting)
    first = assessor.submit(CheckInput(TEXTS[0]))
    for _ in range(40):
        assert assessor.submit(CheckInput(LONG)).cancel()
    last = assessor.submit(CheckInput(TEXTS[1]))
    opened.set()
    assert last.result(60).phases
    assert first.result(60).phases
    assert tokenized == [TEXTS[0], TEXTS[1]]


def test_a_cancelled_check_frees_its_place(loading, gated):
    with loading(reader={"queue_size": 2}) as assessor, gated(assessor) as gate:
        reading = assessor.submit(CheckInput(TEXTS[0]))
        assert gate.arrived.wait(10)
        waiting = assessor.submit(CheckInput(LONG))
        assert waiting.cancel()
        assert assessor.queue_depth == 1
        next_one = assessor.submit(CheckInput(TEXTS[1]))
        gate.open()
        assert next_one.result(60).phases
        assert reading.result(60).phases
        passed = gate.passed
        assessor.check(CheckInput(TEXTS[0]))
        assert (passed, gate.passed) == (2, 3)  # the cancelled text was not read


def test_open_streams_are_limited_and_a_closed_one_makes_room(loading):
    with loading(sessions={"limit": 2}) as assessor:
        first, _ = assessor.open_session(), assessor.open_session()
        with pytest.raises(Exhausted) as caught:
            assessor.open_session()
        assert str(caught.value) == "2 streams are open (sessions.limit); try again later"
        assert (caught.value.reason, caught.value.retry_after_s) == ("TOO_MANY_SESSIONS", 1.0)
        first.close()
        assert assessor.open_sessions == 1
        assessor.open_session()


def test_an_idle_stream_expires_and_one_in_use_does_not(loading, gated):
    with loading(sessions={"limit": 2, "idle_seconds": 0.3}) as assessor:
        idle, busy = assessor.open_session(), assessor.open_session()
        with gated(assessor) as gate:
            future = busy.feed(Phase.PROMPT, TEXTS[0])
            assert gate.arrived.wait(10)
            time.sleep(0.5)
            assessor.open_session()  # there is room: the idle one was closed
            gate.open()
            assert future.result(60).phases
        with pytest.raises(SessionExpired) as caught:
            idle.feed(Phase.PROMPT, "more")
        assert str(caught.value) == "the stream stood idle for more than 0.3 s and was closed"
        until(lambda: assessor.open_sessions == 0)  # nobody has to open another for it


def test_a_stream_that_is_fed_just_as_it_was_to_expire_goes_on(assessor):
    session = assessor.open_session()
    swept = session.last_used + 1  # what the sweep saw, a moment before
    session.last_used += 2
    session.expire(unused_since=swept)
    assert session.feed(Phase.PROMPT, TEXTS[0], last=True).result(60).phases
    session.close()


def test_chunks_of_a_closed_stream_are_refused(assessor):
    session = assessor.open_session()
    session.close()
    with pytest.raises(InvalidInput, match=r"^the stream is closed$"):
        session.feed(Phase.PROMPT, "more")


def test_closing_cancels_whatever_still_waits(loading, gated):
    with loading() as assessor, gated(assessor) as gate:
        reading = assessor.submit(CheckInput(TEXTS[0]))
        assert gate.arrived.wait(10)
        waiting = [assessor.submit(CheckInput(LONG)) for _ in range(40)]
        session = assessor.open_session()
        streamed = [session.feed(Phase.PROMPT, LONG) for _ in range(3)]
        with ThreadPoolExecutor(1) as closing:
            closed = closing.submit(assessor.close)
            until(lambda: assessor.batcher._closed)
            gate.open()
            closed.result(60)
        assert reading.result(10).phases
        for future in (*waiting, *streamed, assessor.submit(CheckInput("late"))):
            with pytest.raises(CancelledError):
                future.result(10)
        assert assessor.queue_depth == 0


def test_only_the_worker_ever_runs_the_model(loading, monkeypatch):
    """OpenMP slows every product of a process in which two threads multiply (by two fifths on 2 cores)."""
    threads, run = set(), TorchReader._run

    def noting(self, *arguments):
        threads.add(threading.current_thread().name)
        return run(self, *arguments)

    monkeypatch.setattr(TorchReader, "_run", noting)
    with loading() as assessor:
        assert threads == {"guard-reader"}  # it has warmed up before anybody asks
        assessor.check(CheckInput(TEXTS[0]))
        stream(assessor, prompt=[TEXTS[0]])
    assert threads == {"guard-reader"}


def test_an_answer_carries_the_callers_id_and_every_stage(assessor):
    verdict = assessor.check(CheckInput("text"), CheckOptions(request_id="r-7"))
    assert verdict.request_id == "r-7"
    assert set(verdict.timings) == {"tokenize", "queue", "read", "encode", "score"}
    assert all(seconds >= 0 for seconds in verdict.timings.values())
