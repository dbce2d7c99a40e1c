"""The one worker that owns the model: jobs come in from many callers and leave in shared batches.

A job is a run of units (the windows of a text, or one step of a stream). Each batch takes a unit of every waiting job
that fits, and what is left of a job then stands behind those that came meanwhile. A short text waits for one batch of
long ones, not for all of them: it passes those that have more to come.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from guard.errors import Exhausted

_PADDING = 64  # tokens that cost about as much as the start of another batch
_TICK_SECONDS = 1.0
_LONGEST_WAIT = 30.0  # seconds after which a refused caller is told to try again, at most

_log = logging.getLogger("guard.reader")


@dataclass(slots=True)
class Job:
    """`units` are what remains to be read; `finish` makes the future's result when the last unit has been read.

    It is handed the error where reading raised one, and answers in its place or raises it.
    """

    units: deque[Any]
    size: Callable[[Any], int]  # padded tokens of a unit
    finish: Callable[[Exception | None], object]
    future: "Future[Any]" = field(default_factory=Future)
    serial: bool = False  # a unit builds on the one before: no two of them share a batch
    queued_at: float = field(default_factory=time.perf_counter)
    started_at: float | None = None


class Batcher:
    """`run(units)` reads one batch and keeps each unit's result with the unit; it raises for the whole batch.

    At most `queue_size` jobs wait or run, with `queue_bytes` of text; one more is refused at once with Exhausted.
    `tick` is called about once a second, between batches.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any]], None],
        *,
        queue_size: int,
        queue_bytes: int,
        batch_tokens: int,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._tick = run, tick
        self._queue_size, self._queue_bytes, self._batch_tokens = queue_size, queue_bytes, batch_tokens
        self._jobs: deque[Job] = deque()
        self._admitted = self._bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        self._long_before = False  # the latest batch was led by a job with units left
        self._unit_s = 0.05  # of the latest batch
        self._thread = threading.Thread(target=self._work, name="guard-reader", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        return self._admitted

    def admit(self, size: int = 0, *, always: bool = False) -> None:
        """Takes a place in the queue for `size` bytes of text.

        Raises Exhausted, with the time after which to try again, where there is no room; one text finds some in an
        empty queue whatever its size. `always` takes one all the same: for callers whose number is bounded elsewhere.
        """
        with self._changed:
            full = ""
            if self._admitted >= self._queue_size:
                full = f"{self._queue_size} requests"
            elif self._admitted and self._bytes + size > self._queue_bytes:
                full = f"{self._bytes} bytes of text, of {self._queue_bytes}"
            if full and not always:
                waiting = sum(len(job.units) for job in self._jobs)
                wait = min(max(0.05, self._unit_s * waiting / 2), _LONGEST_WAIT)
                raise Exhausted(
                    f"the reader's queue is full ({full}); try again in {wait:.2f} s",
                    retry_after_s=wait,
                    reason="QUEUE_FULL",
                )
            self._admitted += 1
            self._bytes += size

    def release(self, size: int = 0) -> None:
        """Gives back a place taken by `admit`."""
        with self._changed:
            self._admitted -= 1
            self._bytes -= size

    def put(self, job: Job) -> None:
        """Queues an admitted job; its place is freed when its future is done."""
        with self._changed:
            if not self._closed:
                self._jobs.append(job)
                self._changed.notify()
                return
        job.future.cancel()  # without the lock: a callback may wait for a caller who waits for a place

    def close(self) -> None:
        """Ends the worker after the batch in hand; jobs still waiting are cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=30)
        for job in self._jobs:
            job.future.cancel()

    def _work(self) -> None:
        ticked = time.monotonic()
        while True:
            with self._changed:
                if not self._jobs and not self._closed:
                    self._changed.wait(_TICK_SECONDS)
                if self._closed:
                    return
                picked = self._pick()
            if picked:
                self._read(picked)
            if time.monotonic() - ticked >= _TICK_SECONDS:
                ticked = time.monotonic()
                try:
                    self._tick()  # without the lock: it takes others, whose holders may wait for a place
                except Exception:  # noqa: BLE001 - the worker must go on
                    _log.exception("what is done between batches failed")

    def _pick(self) -> list[tuple[Job, Any]]:
        """Units of one batch: one of each job that fits, and more of them only where no other job is left waiting.

        The job that waits longest is among them, but in every other batch where short ones pass it. A job with units
        left is queued again once these are read.
        """
        self._let_short_ones_pass()
        picked: list[tuple[Job, Any]] = []
        waiting: deque[Job] = deque()
        longest = 0
        while self._jobs:
            job = self._jobs.popleft()
            if job.future.cancelled():
                continue
            size = job.size(job.units[0])
            if picked and not self._joins(size, longest, len(picked)):
                waiting.append(job)
                continue
            job.started_at = job.started_at or time.perf_counter()
            picked.append((job, job.units.popleft()))
            longest = max(longest, size)
        waiting.extend(self._jobs)
        self._jobs = waiting
        self._long_before = bool(picked and picked[0][0].units)
        more = deque(job for job, _ in picked if not waiting and not job.serial)
        while more:
            job = more.popleft()
            if job.units and self._joins(job.size(job.units[0]), longest, len(picked)):
                longest = max(longest, job.size(job.units[0]))
                picked.append((job, job.units.popleft()))
                more.append(job)
        return picked

    def _let_short_ones_pass(self) -> None:
        """Between two batches that long texts lead, one is led by a job of a single unit, if there is any."""
        if not self._long_before:
            return
        short = next((job for job in self._jobs if len(job.units) == 1 and job.started_at is None), None)
        if short is not None:
            self._jobs.remove(short)
            self._jobs.appendleft(short)

    def _joins(self, size: int, longest: int, count: int) -> bool:
        """Whether one more unit fits, and costs less in padding than a batch of its own would."""
        if max(longest, size) * (count + 1) > self._batch_tokens:
            return False
        return longest - size <= _PADDING if size <= longest else (size - longest) * count <= _PADDING

    def _read(self, picked: list[tuple[Job, Any]]) -> None:
        started = time.perf_counter()
        jobs = list({id(job): job for job, _ in picked}.values())
        try:
            self._run([unit for _, unit in picked])
        except Exception as error:  # noqa: BLE001 - whatever the model raises belongs to the callers of this batch
            _log.exception("reading a batch of %d failed", len(picked))
            for job in jobs:
                job.units.clear()
                self._settle(job, error)
        else:
            for job in jobs:
                if job.units:
                    self.put(job)
                else:
                    self._settle(job, None)
        finally:
            self._unit_s = (time.perf_counter() - started) / len(picked)

    @staticmethod
    def _settle(job: Job, error: Exception | None) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        try:
            job.future.set_result(job.finish(error))
        except Exception as raised:  # noqa: BLE001 - the caller gets it; the worker must go on
            job.future.set_exception(raised)
