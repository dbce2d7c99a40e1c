"""One stream: chunks in, running verdicts out."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from guard.assessor.limits import check_input, check_size
from guard.assessor.pipeline import Reading, Unit
from guard.errors import InvalidInput, SessionExpired
from guard.reader.batching import Job
from guard.reader.contract import Growing
from guard.reader.sequence import TokenSequence, Window
from guard.reader.tokens import Piece, check_text
from guard.records import CheckInput, CheckOptions, Message, Phase, Verdict

if TYPE_CHECKING:
    from guard.assessor.core import Assessor


def stood_idle(seconds: float) -> SessionExpired:
    return SessionExpired(f"the stream stood idle for more than {seconds:g} s and was closed")


class Session:
    """One stream: a prompt and then its completion, chunk by chunk. Earlier chunks are never read again.

    Chunks may be fed without waiting for the verdict of the one before; they are read in order. The last word of a
    chunk is held until the next chunk, or `last`, settles how it is split into tokens.
    """

    def __init__(self, assessor: "Assessor", options: CheckOptions, domains: Sequence[str]) -> None:
        self._assessor, self._options, self._domains = assessor, options, domains
        self._pipeline = assessor.pipeline
        self._reading = Reading(TokenSequence(), {})
        self._stream: Growing | None = None
        self._window: Window | None = None
        self._read_to = 0
        self._text: dict[Phase, str] = dict.fromkeys(Phase, "")  # held: not yet settled into tokens
        self._taken: dict[Phase, int] = dict.fromkeys(Phase, 0)  # characters settled
        self._bytes = 0
        self._fed_phase: Phase | None = None
        self._ended: set[Phase] = set()
        self._chat: tuple[Message, ...] | None = None
        self._waiting: deque[tuple[Callable[[], None], Future[Verdict]]] = deque()
        self.busy = False  # a chunk is on its way
        self._under_way: tuple[int, Window | None] | None = None  # how far all was read before a chunk not yet read
        self._in_flight = 0  # chunks fed and not yet answered
        self._expired = False
        self._closed = False
        self._lock = threading.Lock()
        self.last_used = time.monotonic()

    def feed(self, phase: Phase, text: str, *, last: bool = False) -> "Future[Verdict]":
        """The running verdict with this chunk read. `last` ends the phase; a completion chunk ends the prompt.

        Raises InvalidInput for a chunk of a phase that has ended, text that is not valid or too long in sum, and
        SessionExpired for a stream that was closed because it stood idle.
        """
        check_text(text)
        if phase in self._ended:
            raise InvalidInput(f"the {phase} has ended: no more of its chunks can follow", reason="PHASE_ENDED")
        size = check_size([text], self._assessor.config.limits, before=self._bytes)
        future = self._admit(size - self._bytes)  # before anything changes: a chunk that was refused can be sent again
        self._bytes, self._fed_phase = size, phase
        if phase is Phase.COMPLETION:
            self._ended.add(Phase.PROMPT)
        if last:
            self._ended.add(phase)
        return self._enqueue(lambda: self._take(phase, text, last=last), future)

    def feed_chat(self, messages: tuple[Message, ...]) -> "Future[Verdict]":
        """The whole prompt as a chat. Raises InvalidInput where something has been fed before."""
        if self._fed_phase is not None:
            raise InvalidInput("a chat must come before every other chunk of its stream", reason="PHASE_ENDED")
        size = check_input(CheckInput(prompt=messages), self._assessor.config.limits)
        future = self._admit(size)
        self._bytes, self._fed_phase = size, Phase.PROMPT
        self._ended.add(Phase.PROMPT)
        return self._enqueue(lambda: self._take_chat(messages), future)

    def close(self) -> None:
        """Frees the stream's cache; chunks that still wait are cancelled."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
        for _, future in waiting:
            future.cancel()
        self._stream = None
        self._assessor.caches.forget(self)
        self._assessor.forget(self)

    def drop_cache(self) -> bool:
        """Frees the keys and values of a stream that stands idle: its next chunk reads the window anew."""
        with self._lock:
            if not self.busy:
                self._stream = None
            return not self.busy

    def expire(self, unused_since: float) -> None:
        """Closes the stream unless a chunk has come since then, or is on its way."""
        with self._lock:
            if self._in_flight or self.last_used >= unused_since:
                return
            self._expired = True
        self.close()

    def _admit(self, size: int) -> "Future[Verdict]":
        with self._lock:
            if self._expired:
                raise stood_idle(self._assessor.config.sessions.idle_seconds)
            if self._closed:
                raise InvalidInput("the stream is closed", reason="STREAM_CLOSED")
            self.last_used = time.monotonic()
            # The number of streams is bounded: a full queue refuses what a stream feeds ahead, never the stream itself.
            self._assessor.batcher.admit(size, always=not self._in_flight)
            self._in_flight += 1
        future: Future[Verdict] = Future()
        future.add_done_callback(lambda _: self._leave(size))
        return future

    def _leave(self, size: int) -> None:
        with self._lock:
            self._in_flight -= 1
        self._assessor.batcher.release(size)

    def _enqueue(self, take: Callable[[], None], future: "Future[Verdict]") -> "Future[Verdict]":
        with self._lock:
            self._waiting.append((take, future))
        self._advance()
        return future

    def _advance(self) -> None:
        """Starts the next chunk where none is being read: one at a time keeps them in order."""
        with self._lock:
            if self.busy or not self._waiting:
                return
            self.busy = True
            take, future = self._waiting.popleft()
        self._assessor.hand_over(future, self._start, take, future)

    def _start(self, take: Callable[[], None], future: "Future[Verdict]") -> None:
        future.add_done_callback(self._next)
        if self._closed:
            future.cancel()
            return
        try:
            started = time.perf_counter()
            self._reading.timings = {}
            self._recover()
            take()
            self._under_way = (self._read_to, self._window)
            units: list[tuple[Unit, int]] = list(self._units())
            self._reading.timings["tokenize"] = time.perf_counter() - started
            job: Job

            def finish(error: Exception | None) -> Verdict:
                self._reading.timings["queue"] = (job.started_at or job.queued_at) - job.queued_at
                scoring = time.perf_counter()
                self._reading.details.clear()  # a running verdict details the tokens of its own chunk
                self._reading.failed.clear()
                if error is None:
                    self._under_way = None
                    self._pipeline.absorb(self._reading, units, keep_details=self._options.token_detail)
                else:
                    unread = self._reading.tokens.phase[units[0][1] :]
                    self._reading.failed.update(phase for phase in unread if phase is not None)
                self.last_used = time.monotonic()
                self._assessor.caches.count(self, self._stream.nbytes if self._stream is not None else 0)
                if self._closed:  # meanwhile
                    self._assessor.caches.forget(self)
                return self._pipeline.verdict(self._reading, self._options, self._domains, "watch", scoring)

            job = Job(deque(unit for unit, _ in units), lambda unit: len(unit.ids), finish, future, serial=True)
            if units:
                self._assessor.batcher.put(job)
            elif future.set_running_or_notify_cancel():
                future.set_result(finish(None))
        except Exception as error:  # noqa: BLE001 - the caller of the future gets it
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _next(self, _done: "Future[Verdict]") -> None:
        self.busy = False
        self._advance()

    def _recover(self) -> None:
        """Where the chunk before was cancelled or its reading failed, its tokens are read with this one, not lost."""
        if self._under_way is not None:
            self._read_to, self._window = self._under_way
            self._under_way = None
            self._stream = None  # it may have read some of them

    def _take(self, phase: Phase, text: str, *, last: bool) -> None:
        """Moves what this chunk settles from text to tokens."""
        if phase is Phase.COMPLETION:
            self._settle(Phase.PROMPT, everything=True)
            self._open_reply()
        self._text[phase] += text
        self._settle(phase, everything=last)

    def _settle(self, phase: Phase, *, everything: bool) -> None:
        tokenizer = self._pipeline.tokenizer
        held = self._text[phase]
        if phase is not self._fed_phase and not held:
            return
        if phase not in self._reading.states and held:
            self._reading.states[phase] = self._pipeline.heads.new_state()
            self._reading.blank.add(phase)
        piece, taken, left = (tokenizer.text(held), len(held), 0) if everything else tokenizer.settle(held)
        self._reading.tokens.append(piece, phase, shift=self._taken[phase])
        if held[:taken].strip():
            self._reading.blank.discard(phase)
        self._taken[phase] += taken
        self._text[phase] = held[taken:]
        self._reading.held[phase] = left

    def _take_chat(self, messages: tuple[Message, ...]) -> None:
        self._chat = messages
        self._reading.states[Phase.PROMPT] = self._pipeline.heads.new_state()
        for piece in self._pipeline.tokenizer.chat(messages, open_reply=False):
            self._reading.tokens.append(piece, Phase.PROMPT)

    def _open_reply(self) -> None:
        """What the chat template writes between the prompt and the assistant's answer."""
        if self._chat is None:
            return
        whole = TokenSequence()
        for piece in self._pipeline.tokenizer.chat(self._chat, open_reply=True):
            whole.append(piece, Phase.PROMPT)
        behind = len(self._reading.tokens)
        if whole.ids[:behind] != self._reading.tokens.ids:
            raise InvalidInput("the model's chat template changes the prompt when a reply begins: use Check")
        self._chat = None
        opening = whole.ids[behind:]
        self._reading.tokens.append(Piece(opening, [(0, 0)] * len(opening)), Phase.PROMPT)

    def _units(self) -> "list[tuple[Unit, int]]":
        """The unread tokens as steps of the stream, a new one wherever a window is full."""
        tokens, plan = self._reading.tokens, self._pipeline.plan
        units = []
        while self._read_to < len(tokens):
            begin = self._read_to
            window = self._window or plan.first(sink=tokens.phase[0] is not None)
            if begin >= window.end:
                window, self._stream = plan.after(window), None
            context: list[int] = []
            if self._stream is None:
                self._stream = self._pipeline.reader.new_stream()
                context = [self._pipeline.tokenizer.sink_id] * window.sink + tokens.ids[window.begin : begin]
            self._window = window
            end = min(len(tokens), window.end)
            units.append((Unit([*context, *tokens.ids[begin:end]], len(context), self._stream), begin))
            self._read_to = end
        return units
