"""The worker: batches are shared, order and bounds hold, and one caller's failure stays with that batch."""

import threading
import time
from collections import deque
from concurrent.futures import Future

import pytest

from guard.errors import Exhausted
from guard.reader.batching import Batcher, Job


def put(batcher, sizes, *, bad=False):
    units = deque({"size": size, "bad": bad} for size in sizes)
    kept = list(units)
    batcher.admit()
    future = Future()
    future.add_done_callback(lambda _: batcher.release())

    def finish(error):
        if error:
            raise error
        return [unit.get("batch") for unit in kept]

    batcher.put(Job(units, lambda unit: unit["size"], finish, future))
    return future


@pytest.fixture
def gate():
    """A batcher whose first batch waits until the test opens the gate, so that jobs gather behind it."""
    opened, batches = threading.Event(), []

    def run(units):
        if units[0].get("bad"):
            raise RuntimeError("the model failed")
        if len(batches) == 0:
            opened.wait(10)
        for unit in units:
            unit["batch"] = len(batches)
        batches.append([unit["size"] for unit in units])

    batcher = Batcher(run, queue_size=8, queue_bytes=1000, batch_tokens=100)
    yield batcher, opened, batches
    opened.set()
    batcher.close()


def test_what_is_done_between_batches_may_wait_for_callers_who_wait_for_a_place():
    admitted = threading.Event()

    def tick():
        caller = threading.Thread(target=lambda: (batcher.admit(), admitted.set()))
        caller.start()
        caller.join(5)

    batcher = Batcher(lambda units: None, queue_size=2, queue_bytes=8, batch_tokens=8, tick=tick)
    try:
        assert admitted.wait(4)
    finally:
        batcher.close()


def test_waiting_jobs_share_a_batch_up_to_its_padded_size(gate):
    batcher, opened, batches = gate
    first = put(batcher, [10])
    time.sleep(0.1)
    others = [put(batcher, [30]) for _ in range(5)]
    opened.set()
    assert first.result(5) == [0]
    assert [f.result(5)[0] for f in others] == [1, 1, 1, 2, 2]
    assert batches == [[10], [30, 30, 30], [30, 30]]


@pytest.mark.parametrize("windows", [100, 50])  # one to a batch, and two
def test_a_short_text_waits_for_one_batch_of_a_long_one(gate, windows):
    batcher, opened, _ = gate
    long = put(batcher, [windows] * 20)
    time.sleep(0.1)
    short = put(batcher, [5])
    opened.set()
    assert short.result(5) == [1]
    long.result(5)


def test_long_texts_take_turns_and_one_alone_fills_its_batches(gate):
    batcher, opened, batches = gate
    put(batcher, [10])
    time.sleep(0.1)
    futures = [put(batcher, [50, 50, 50, 50]), put(batcher, [100, 100])]
    opened.set()
    assert [future.result(5) for future in futures] == [[1, 3, 5, 5], [2, 4]]
    assert batches == [[10], [50], [100], [50], [100], [50, 50]]


def test_a_full_queue_refuses_at_once_with_a_time_to_retry(gate):
    batcher, opened, _ = gate
    futures = [put(batcher, [10]) for _ in range(8)]
    started = time.monotonic()
    with pytest.raises(Exhausted, match=r"the reader's queue is full \(8 requests\)") as caught:
        batcher.admit()
    assert time.monotonic() - started < 0.5
    assert caught.value.retry_after_s > 0
    opened.set()
    for future in futures:
        future.result(5)
    deadline = time.monotonic() + 5
    while batcher.depth and time.monotonic() < deadline:
        time.sleep(0.01)
    batcher.admit()  # places came free again


def test_a_text_that_the_queue_has_no_room_for_is_refused_unless_it_comes_alone(gate):
    batcher, _, _ = gate
    batcher.admit(5000)
    with pytest.raises(Exhausted, match=r"the reader's queue is full \(5000 bytes of text, of 1000\)"):
        batcher.admit(1)
    batcher.admit(1, always=True)
    batcher.release(5000)
    batcher.admit(999)
    with pytest.raises(Exhausted):
        batcher.admit(1)


def test_a_cancelled_job_is_not_read_and_frees_its_place(gate):
    batcher, opened, batches = gate
    put(batcher, [10])
    time.sleep(0.1)
    cancelled = put(batcher, [33])
    assert cancelled.cancel()
    after = put(batcher, [44])
    opened.set()
    after.result(5)
    assert [33] not in batches
    assert batcher.depth <= 1


def test_a_failing_batch_reaches_its_callers_and_the_worker_goes_on(gate):
    batcher, opened, _ = gate
    opened.set()
    put(batcher, [10]).result(5)
    bad = put(batcher, [10], bad=True)
    with pytest.raises(RuntimeError, match="the model failed"):
        bad.result(5)
    assert put(batcher, [10]).result(5)


def test_a_job_may_answer_in_place_of_a_failed_batch(gate):
    batcher, opened, _ = gate
    opened.set()
    put(batcher, [10]).result(5)
    bad = deque([{"size": 10, "bad": True}, {"size": 10}])
    job = Job(bad, lambda unit: unit["size"], lambda error: f"not read: {error}")
    batcher.put(job)
    assert job.future.result(5) == "not read: the model failed"
    assert put(batcher, [10]).result(5)


@pytest.mark.parametrize(("windows", "least", "most"), [(1, 0.05, 5), (40, 10, 30), (10_000, 30, 30)])
def test_the_time_to_retry_grows_with_what_waits(windows, least, most):
    opened = threading.Event()
    batcher = Batcher(lambda _: opened.wait(0.2), queue_size=4, queue_bytes=8, batch_tokens=10)
    try:
        put(batcher, [10]).result(5)  # a batch takes 0.2 s
        for _ in range(4):
            put(batcher, [10] * windows)
        with pytest.raises(Exhausted) as caught:
            batcher.admit()
        assert least <= caught.value.retry_after_s <= most
        batcher.admit(always=True)
        assert batcher.depth == 5
    finally:
        opened.set()
        batcher.close()
