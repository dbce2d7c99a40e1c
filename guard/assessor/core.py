"""The assessor: admits checks and streams from many threads, and hands back futures."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from guard.assessor.caches import Caches
from guard.assessor.limits import check_input, chosen_domains
from guard.assessor.observed import Observed
from guard.assessor.observer import Observer
from guard.assessor.pipeline import Pipeline, Reading, Unit
from guard.assessor.session import Session
from guard.config import GuardConfig
from guard.errors import Exhausted
from guard.pack import catalogue
from guard.reader.batching import Batcher, Job
from guard.records import CheckInput, CheckOptions, Feature, LatentId, Phase, Verdict


class Assessor:
    """Loads a pack and a reader, and answers from many threads; one worker thread owns the model."""

    def __init__(self, config: GuardConfig, pipeline: Pipeline, observer: Observer) -> None:
        self.config, self.pipeline = config, pipeline
        self.pack, self.model, self.policy = pipeline.pack, pipeline.model, pipeline.policy
        self.encode_backend, self.reader_dtype = pipeline.encode.name, pipeline.reader_dtype
        self._sessions: set[Session] = set()
        self._lock = threading.Lock()
        self.caches = Caches(config.sessions.cache_bytes)
        self.observed = Observed(pipeline, config)
        # One thread for the tokens of long texts and of streams' chunks, one that owns the model.
        self.texts = ThreadPoolExecutor(1, "guard-text")
        self.batcher = Batcher(
            pipeline.run,
            queue_size=config.reader.queue_size,
            queue_bytes=max(config.reader.queue_bytes, config.limits.text_bytes),
            batch_tokens=config.reader.batch_tokens,
            tick=self._tick,
        )
        self._warm_up()
        self.observer = observer

    @property
    def observer(self) -> Observer:
        return self.pipeline.observer

    @observer.setter
    def observer(self, observer: Observer) -> None:
        self.pipeline.observer = observer

    @classmethod
    def load(
        cls,
        config: GuardConfig,
        *,
        report: Callable[[str], None] = lambda _: None,
        observer: Observer | None = None,
    ) -> "Assessor":
        """Raises ConfigError, PackError and WeightsError; fetches the default model's weights when they are absent."""
        return cls(config, Pipeline(config, report=report), observer or Observer())

    # -- whole texts

    def submit(self, given: CheckInput, options: CheckOptions | None = None) -> "Future[Verdict]":
        """Queues a check; cancelling frees its place. Raises InvalidInput, NotFound (a domain), Exhausted at once."""
        options = options or CheckOptions()
        domains = chosen_domains(options, self.pack.domains)
        size = check_input(given, self.config.limits)
        self.batcher.admit(size)
        future: Future[Verdict] = Future()
        future.add_done_callback(lambda _: self.batcher.release(size))
        self.hand_over(future, self._start_check, given, options, domains, future)
        return future

    def check(self, given: CheckInput, options: CheckOptions | None = None) -> Verdict:
        return self.submit(given, options).result()

    def _start_check(
        self, given: CheckInput, options: CheckOptions, domains: Sequence[str], future: "Future[Verdict]"
    ) -> None:
        try:
            if future.cancelled():  # else texts that nobody waits for would hold up those behind them
                return
            started = time.perf_counter()
            tokens = self.pipeline.tokenize(given)
            if future.cancelled():
                return
            states = {phase: self.pipeline.heads.new_state() for phase in Phase if phase in set(tokens.phase)}
            reading = Reading(tokens, states)
            plan = self.pipeline.plan_of(tokens, chat=isinstance(given.prompt, tuple))
            job: Job

            def finish(error: Exception | None) -> Verdict:
                reading.timings["queue"] = (job.started_at or job.queued_at) - job.queued_at
                scoring = time.perf_counter()
                if error is None:
                    self.pipeline.absorb(reading, (*plan.known, *plan.reads), keep_details=options.token_detail)
                    self.pipeline.keep(plan)
                else:
                    reading.failed.update(reading.states)
                return self.pipeline.verdict(reading, options, domains, "check", scoring)

            units = deque(unit for unit, _ in plan.reads)
            job = Job(units, lambda unit: len(unit.ids), finish, future, serial=True)
            reading.timings["tokenize"] = job.queued_at - started
            self.batcher.put(job)
        except Exception as error:  # noqa: BLE001 - the caller of the future gets it
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def hand_over(self, future: "Future[Verdict]", work: Callable[..., None], *arguments: object) -> None:
        """Runs `work`, which settles `future`, on the text thread; once that is closed, the future is cancelled."""
        try:
            task = self.texts.submit(work, *arguments)
        except RuntimeError:  # how an executor says that it is shut down
            future.cancel()
            return
        task.add_done_callback(lambda done: future.cancel() if done.cancelled() else None)

    # -- streams

    def open_session(self, options: CheckOptions | None = None) -> "Session":
        """Opens a stream. Raises NotFound (a domain) and Exhausted (too many open streams)."""
        options = options or CheckOptions()
        domains = chosen_domains(options, self.pack.domains)
        self._sweep()
        with self._lock:
            if len(self._sessions) >= self.config.sessions.limit:
                raise Exhausted(
                    f"{self.config.sessions.limit} streams are open (sessions.limit); try again later",
                    retry_after_s=1.0,
                    reason="TOO_MANY_SESSIONS",
                )
            session = Session(self, options, domains)
            self._sessions.add(session)
        return session

    def _warm_up(self) -> None:
        # torch sets itself up on its first call: no caller waits for it. It must be the worker that calls: OpenMP keeps
        # helpers for every thread that ever multiplied, and they sleep between products where they outnumber cores.
        unit = Unit([self.pipeline.tokenizer.sink_id] * 16, skip=0)
        done: Future[None] = Future()

        def finish(error: Exception | None) -> None:
            if error is not None:
                raise error

        self.batcher.put(Job(deque([unit]), lambda _: len(unit.ids), finish, done))
        done.result()

    @property
    def queue_depth(self) -> int:
        return self.batcher.depth

    @property
    def session_bytes(self) -> int:
        """Memory of the open streams' caches."""
        return self.caches.nbytes

    @property
    def prefix_bytes(self) -> int:
        return self.pipeline.prefixes.nbytes

    @property
    def open_sessions(self) -> int:
        return len(self._sessions)

    def close(self) -> None:
        """Ends the worker after the batch in hand; what still waits is cancelled."""
        with self._lock:
            open_ = list(self._sessions)
        for session in open_:
            session.close()
        self.texts.shutdown(wait=True, cancel_futures=True)
        self.batcher.close()

    def _tick(self) -> None:
        self._sweep()
        self.observed.sweep()
        self.pipeline.prefixes.sweep()

    def _sweep(self) -> None:
        oldest = time.monotonic() - self.config.sessions.idle_seconds
        with self._lock:
            idle = [session for session in self._sessions if session.last_used < oldest]
        for session in idle:
            session.expire(oldest)

    def forget(self, session: "Session") -> None:
        with self._lock:
            self._sessions.discard(session)

    def features(self, *, domain: str = "", subdomain: str = "", hook_point: str = "") -> list[Feature]:
        """Raises NotFound for a domain, sub-domain or hook point that no latent of the pack has."""
        return catalogue.features(self.pack, domain=domain, subdomain=subdomain, hook_point=hook_point)

    def feature(self, latent: LatentId) -> Feature:
        """Raises NotFound for a latent that the pack does not hold."""
        return catalogue.feature(self.pack, latent)
