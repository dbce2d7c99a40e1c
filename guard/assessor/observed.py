"""Requests of served models as taps observe them: rows in, running verdicts out.

A request is made by its rows alone, or announced before by somebody who follows it. Its tokens are read in the order of
their positions; rows that are there already are passed over, and where some are left out the phase is not assessed from
there on. Everything behind a hit is what reader mode uses: phase states, heads, policy.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

from guard.assessor.links import Follower, Link, check_tap
from guard.assessor.observing import LOST, Request
from guard.assessor.pipeline import Pipeline
from guard.assessor.told import Progress, no_rows, verdict
from guard.config import GuardConfig
from guard.errors import ConfigError
from guard.reader.turns import Template
from guard.records import CheckOptions, ModelInfo, NotAssessed, NotAssessedReason, Phase, Verdict
from guard.scoring.pooling import Ints
from guard.tap.protocol import Ended, Rows, Step, TapInfo

_log = logging.getLogger("guard.tap")


class Observed:
    """All requests that taps observe. Any thread may call any method."""

    def __init__(self, pipeline: Pipeline, config: GuardConfig) -> None:
        self._pipeline, self._config = pipeline, config.taps
        self._allow_unverified = config.reader.allow_unverified
        self._requests: dict[str, Request] = {}  # open
        self._ended: OrderedDict[str, Request] = OrderedDict()  # by the time of their end
        self._links: set[Link] = set()
        self._announced: dict[str, set[Follower]] = {}  # of requests that have not come
        self._full = False  # and rows were passed over since it was not
        self.lock = threading.RLock()
        self.trouble = ""  # why the taps are not serving; empty where they are
        self._trouble_since = 0.0
        self._trouble_announced = False
        self.on_trouble: Callable[[str], None] = lambda _: None

    @cached_property
    def template(self) -> Template:
        return Template(self._pipeline.tokenizer)

    # -- taps

    def connect(self, info: TapInfo) -> Link:
        """Raises ConfigError, with what to do, for a tap whose pack, hook points, model or engine do not fit."""
        try:
            check_tap(info, self._pipeline.pack, self._config, allow_unverified=self._allow_unverified)
        except ConfigError as error:
            with self.lock:
                self._trouble(f"a tap was refused: {error}")
            raise
        verified = info.model == self._pipeline.pack.manifest.model.weights
        link = Link(self, info, ModelInfo(info.model, verified))
        with self.lock:
            self._links.add(link)
            self._report(info.engine)
        return link

    def take(self, link: Link, step: Step, dropped: int) -> None:
        with self.lock:
            began = time.perf_counter()
            touched: dict[str, Request] = {}
            tokens, counted = 0, []
            for rows in step.rows:
                request = self._open(link, rows.request_id, rows.begin)
                if request is None:
                    continue
                new, fired = self._absorb(request, rows)
                tokens += new
                counted += fired
                touched[rows.request_id] = request
            self._pipeline.count_hits(counted)
            if step.rows:
                link.read_at = time.monotonic()
            self._judge(list(touched.values()))
            # Two engines may serve one id, and a tap that was cut off comes again: who brings rows is told to stop.
            link.stops.update(request.id for request in touched.values() if request.stopping)
            for missed in step.missed:
                request = self._open(link, missed.request_id, 0)
                if request is not None:
                    request.miss(missed.detail)
                    touched[missed.request_id] = request
            for ended in step.ended:
                request = self._open(link, ended.request_id, 0)
                if request is not None:
                    self._end(request, ended)
                    touched[ended.request_id] = request
            if tokens and self.trouble and self._over(link, touched.values()):
                self._clear()
            self._pipeline.observer.tap_step(link.info.engine, len(step.rows), tokens, dropped)
            self._report(link.info.engine)
            spent = (time.perf_counter() - began) / max(1, len(touched))
            for request in touched.values():
                request.spent += spent
                request.advanced()

    def _absorb(self, request: Request, rows: Rows) -> tuple[int, list[Ints]]:
        try:
            return request.absorb(self._pipeline, rows)
        except Exception:  # noqa: BLE001 - the other requests of the step go on
            _log.exception("rows of a tapped request could not be read")
            detail = "its rows could not be read: Guard's log says why"
            for phase in Phase:
                request.fail(NotAssessed(NotAssessedReason.READER_FAILED, detail, phase))
            return 0, []

    def lose(self, link: Link) -> None:
        with self.lock:
            self._links.discard(link)
            left = [request for request in self._requests.values() if request.link is link]
            for request in left:
                self._lose(request, "the tap's connection ended while the request was open")
            if left:
                self._trouble(f"a tap of {link.info.engine} went away with {len(left)} requests open")
            self._report(link.info.engine)

    def _open(self, link: Link, request_id: str, begin: int) -> Request | None:
        """The request of this id; a new one where there is none, or the last of that id has ended.

        None where too many are open.
        """
        request = self._requests.get(request_id)
        if request is not None:
            return request
        if len(self._requests) >= self._config.sessions:
            self._pass_over(request_id)
            return None
        request = Request(request_id, link, self.template, sink=begin == 0)
        self._ended.pop(request_id, None)
        self._requests[request_id] = request
        for follower in self._announced.pop(request_id, ()):
            request.join(follower)
        link.open.add(request_id)
        return request

    def _pass_over(self, request_id: str) -> None:
        for follower in self._announced.get(request_id, ()):
            follower.passed_over = True
        if not self._full:
            _log.warning("rows are passed over: %d requests are open (taps.sessions)", len(self._requests))
        self._full = True

    def _judge(self, requests: Sequence[Request]) -> None:
        """What each phase that advanced calls for; a block goes to the tap where the settings say so."""
        asked = [(request, phase) for request in requests for phase in request.to_judge(self._config.least_tokens)]
        if not asked:
            return
        actions = self._pipeline.heads.actions([request.reading.states[phase] for request, phase in asked])
        for (request, phase), found in zip(asked, actions, strict=True):
            blocked = request.told(phase, found)
            if blocked and phase.value in self._config.stop:
                request.stopping = True
                request.link.stops.add(request.id)

    def _end(self, request: Request, ended: Ended) -> None:
        fired = request.end(self._pipeline, ended)
        self._pipeline.count_hits(fired)
        self._judge([request])
        self._finish(request, request.finish_reason)

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        request.link.open.discard(request.id)
        for link in self._links | {request.link}:
            link.need_not_stop(request.id)
        self._pipeline.observer.ended(self._verdict(request, CheckOptions(max_attributions=0, request_id=request.id)))
        del self._requests[request.id]
        self._ended[request.id] = request
        if len(self._ended) > self._config.sessions:
            self._ended.popitem(last=False)
        request.last_used = time.monotonic()
        request.let_go()

    def _lose(self, request: Request, detail: str) -> None:
        request.fail(NotAssessed(NotAssessedReason.TAP_LOST, detail, request.phase))
        self._finish(request, LOST)
        request.advanced()

    # -- followers

    def follow(self, follower: Follower) -> None:
        """Announces a request, or follows one that is there, until `leave`: in either order, as cancelled calls may."""
        with self.lock:
            request = self._requests.get(follower.request_id)
            if request is None and not follower.upcoming:
                request = self._ended.get(follower.request_id)
            if follower.left:
                return
            if request is None:
                self._announced.setdefault(follower.request_id, set()).add(follower)
            else:
                request.join(follower)

    def leave(self, follower: Follower) -> None:
        with self.lock:
            follower.left = True
            if follower.request is not None:
                follower.request.followers.discard(follower)
            elif (announced := self._announced.get(follower.request_id)) is not None:
                announced.discard(follower)
                if not announced:
                    del self._announced[follower.request_id]

    def find(self, request_id: str) -> Request | None:
        """The request of this id, open or ended not long ago; None where no row of it has come."""
        with self.lock:
            return self._requests.get(request_id) or self._ended.get(request_id)

    def progress(
        self,
        request: Request,
        options: CheckOptions,
        domains: Sequence[str],
        since: Progress | None = None,
        *,
        full: bool = False,
    ) -> Progress:
        """The request's newest state.

        With the verdict where an action has changed since, at its end, or where `full` asks for it.
        """
        with self.lock:
            full = full or since is None or bool(request.finish_reason) or request.changes != since.changes
            return Progress(
                version=request.version,
                changes=request.changes,
                prompt_read=request.counts[Phase.PROMPT],
                completion_read=request.counts[Phase.COMPLETION],
                finish_reason=request.finish_reason,
                verdict=self._verdict(request, options, domains) if full else None,
            )

    def no_rows(self, follower: Follower, options: CheckOptions) -> Verdict:
        """The verdict on a request that was announced and never came."""
        detail = f"no tap has brought rows of this request within {self._config.wait_seconds:g} s (taps.wait_seconds)"
        if follower.passed_over:
            detail = f"its rows were passed over: {self._config.sessions} other requests were open (taps.sessions)"
        else:
            with self.lock:
                # Where others' rows come, this one waits in the engine's queue, or is nobody's: the taps serve.
                if not any(link.read_at >= follower.announced_at for link in self._links):
                    self._trouble(f"request {options.request_id!r} was announced: {detail}", announced=True)
        return no_rows(self._pipeline, options, detail)

    def _verdict(self, request: Request, options: CheckOptions, domains: Sequence[str] = ()) -> Verdict:
        return verdict(request, self._pipeline, options, self._config.least_tokens, domains)

    # -- what passes

    def _trouble(self, what: str, *, announced: bool = False) -> None:
        self.trouble, self._trouble_since, self._trouble_announced = what, time.monotonic(), announced
        self.on_trouble(what)

    def _over(self, link: Link, touched: Iterable[Request]) -> bool:
        """Whether rows of this tap end the trouble: of a tap that came after it, or of a request that was announced."""
        if self._trouble_announced:
            return any(request.followers for request in touched)
        return link.connected_at >= self._trouble_since

    def _clear(self) -> None:
        self.trouble = ""
        self.on_trouble("")

    def _report(self, engine: str) -> None:
        links = [link for link in self._links if link.info.engine == engine]
        self._pipeline.observer.taps(engine, len(links), sum(len(link.open) for link in links))

    def sweep(self) -> None:
        """Lets go of requests that have stood for too long; to be called every second or so, rows or none."""
        if not self.lock.acquire(blocking=False):  # a step is being read: who calls has texts to read meanwhile
            return
        try:
            now = time.monotonic()
            lost = [r for r in self._requests.values() if now - r.last_used > self._config.idle_seconds]
            for request in lost:
                self._lose(request, f"no rows have come for {self._config.idle_seconds:g} s (taps.idle_seconds)")
            for engine in {request.link.info.engine for request in lost}:
                self._report(engine)
            while self._ended and now - next(iter(self._ended.values())).last_used > self._config.keep_seconds:
                self._ended.popitem(last=False)
            self._full = self._full and len(self._requests) >= self._config.sessions
        finally:
            self.lock.release()
