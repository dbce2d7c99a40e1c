"""The worker: batches are shared, order and bounds hold, and one caller's failure stays with that batch."""

import threading
import time
from collections import deque
from concurrent.futures import Future

import pytest

from guard.errors import Exhausted
from guard.reader.batching import Batcher, Job


def put(batcher, sizes, *, alone=False):
    units = deque({"size": size} for size in sizes)
    kept = list(units)
    batcher.admit()
    future = Future()
    future.add_done_callback(lambda _: batcher.release())
    batcher.put(Job(units, lambda unit: unit["size"], lambda: [unit["batch"] for unit in kept], future, alone=alone))
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

    batcher = Batcher(run, queue_size=8, batch_tokens=100)
    yield batcher, opened, batches
    opened.set()
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


def test_a_long_text_does_not_hold_back_a_short_one(gate):
    batcher, opened, _ = gate
    put(batcher, [10])
    time.sleep(0.1)
    long = put(batcher, [100] * 20)
    short = put(batcher, [5])
    opened.set()
    assert short.result(5)[0] <= 2
    assert long.result(5)[-1] > 15


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
    bad = deque([{"size": 10, "bad": True}])
    batcher.admit()
    future = Future()
    batcher.put(Job(bad, lambda unit: unit["size"], lambda: None, future))
    with pytest.raises(RuntimeError, match="the model failed"):
        future.result(5)
    assert put(batcher, [10]).result(5)
