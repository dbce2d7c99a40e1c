"""The waist: text in, verdict out. Every way in goes through here, and everything behind it is the same code.

    text -> tokens -> windows -> reader -> encode -> phase state -> heads -> policy -> verdict

The assessor builds its parts from config, wires them together, and owns none of their logic.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from guard.config import GuardConfig
from guard.errors import Exhausted, GuardError, InvalidInput, NotFound, SessionExpired
from guard.kernels import choice
from guard.kernels.contract import Encoded, EncodeRows
from guard.pack.loader import HookPointRows, check_model, load_pack
from guard.policy import decide
from guard.reader import weights
from guard.reader.batching import Batcher, Job
from guard.reader.model import Activations, Stream, TorchReader, pick_dtype
from guard.reader.sequence import TokenSequence, Window, WindowPlan, window_ids
from guard.reader.tokens import Piece, TextTokenizer, check_text
from guard.records import (
    Action,
    CheckInput,
    CheckOptions,
    DomainVerdict,
    Feature,
    LatentId,
    Message,
    NotAssessed,
    NotAssessedReason,
    Phase,
    PhaseVerdict,
    TokenDetail,
    TokenExample,
    Verdict,
    worst,
)
from guard.scoring.heads import HeadSet
from guard.scoring.pooling import Hits, Ints, PhaseState

MAX_ATTRIBUTIONS = 100


class Observer:
    """What the assessor reports as it works; the service turns it into metrics."""

    def verdict(self, verdict: Verdict, method: str) -> None:
        """A verdict is ready; `method` is `check` or `watch`."""

    def hits(self, counts: Sequence[int]) -> None:
        """Hits since the last call, by row, in the order of `pack.latents`."""

    def batch(self, sequences: int, tokens: int, seconds: dict[str, float]) -> None:
        """A batch was read; seconds by stage (read, encode)."""


@dataclass(slots=True)
class _Reading:
    """One text or stream on its way: its tokens, and the running state of each phase."""

    tokens: TokenSequence
    states: dict[Phase, PhaseState]
    read: dict[Phase, int] = field(default_factory=dict)
    held: dict[Phase, int] = field(default_factory=dict)
    details: dict[Phase, list[tuple[Hits, Ints]]] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Unit:
    """A window to read: of a whole text, or the next tokens of a stream."""

    ids: list[int]
    skip: int  # leading tokens that are context only
    stream: Stream | None = None
    encoded: tuple[Encoded, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


class Assessor:
    """Loads a pack and a reader, and answers from many threads; one worker thread owns the model."""

    def __init__(self, config: GuardConfig, *, report: Callable[[str], None], observer: Observer) -> None:
        self.config, self.observer = config, observer
        self.pack = load_pack(config.pack)
        folder = weights.resolve(config.reader.model, report=report)
        self.model = check_model(self.pack, weights.fingerprint(folder), config.reader.allow_unverified)
        own = {head.name: (head.flag_at, head.block_at) for head in self.pack.manifest.heads}
        chosen = decide.thresholds(own, config.policy)
        self.policy = decide.info(config.policy, chosen)
        self._names = tuple(_name(line.explanation, line.top_tokens) for line in self.pack.latents)
        self.heads = HeadSet(self.pack, chosen, decide.decide, self._names)
        if config.reader.threads:
            torch.set_num_threads(config.reader.threads)
        dtype = pick_dtype(config.reader.dtype)
        self.reader_dtype = str(dtype).removeprefix("torch.")
        self._tokenizer = TextTokenizer(folder)
        self._reader = TorchReader(folder, [p.name for p in self.pack.hook_points], dtype=dtype)
        self._encode = choice.choose(config.encode.backend)
        self.encode_backend = self._encode.name
        self._rows = [_encode_rows(p) for p in self.pack.hook_points]
        self._row_offsets = np.cumsum([0, *(len(p.latents) for p in self.pack.hook_points)])
        self._plan = WindowPlan(config.reader.window, min(config.reader.overlap, config.reader.window // 2))
        self._sessions: set[Session] = set()
        self._lock = threading.Lock()
        self._texts = ThreadPoolExecutor(1, "guard-text")
        self._batcher = Batcher(
            self._run,
            queue_size=config.reader.queue_size,
            batch_tokens=config.reader.batch_tokens,
            idle=self._sweep,
        )

    @classmethod
    def load(
        cls,
        config: GuardConfig,
        *,
        report: Callable[[str], None] = lambda _: None,
        observer: Observer | None = None,
    ) -> "Assessor":
        """Raises ConfigError, PackError and WeightsError; fetches the default model's weights when they are absent."""
        return cls(config, report=report, observer=observer or Observer())

    # -- whole texts

    def submit(self, given: CheckInput, options: CheckOptions | None = None) -> "Future[Verdict]":
        """Queues a check. Raises InvalidInput, NotFound (a domain) and Exhausted at once; cancelling frees its place."""
        options = options or CheckOptions()
        domains = self._domains(options)
        self._check_input(given)
        self._batcher.admit()
        future: Future[Verdict] = Future()
        future.add_done_callback(lambda _: self._batcher.release())
        self._texts.submit(self._start_check, given, options, domains, future)
        return future

    def check(self, given: CheckInput, options: CheckOptions | None = None) -> Verdict:
        return self.submit(given, options).result()

    def _start_check(
        self, given: CheckInput, options: CheckOptions, domains: Sequence[str], future: "Future[Verdict]"
    ) -> None:
        try:
            started = time.perf_counter()
            tokens = self._tokenize(given)
            reading = _Reading(tokens, {phase: self.heads.new_state() for phase in Phase if phase in set(tokens.phase)})
            windows = list(self._plan.cover(len(tokens), sink=tokens.phase[0] is not None))
            units = [
                _Unit(window_ids(tokens.ids, w, self._tokenizer.sink_id), skip=w.fresh - w.begin + w.sink)
                for w in windows
            ]
            job: Job

            def finish() -> Verdict:
                reading.timings["queue"] = (job.started_at or job.queued_at) - job.queued_at
                scoring = time.perf_counter()
                for window, unit in zip(windows, units, strict=True):
                    self._absorb(reading, unit, window.fresh, keep_details=options.token_detail)
                return self._verdict(reading, options, domains, "check", scoring)

            job = Job(deque(units), lambda unit: len(unit.ids), finish, future)
            reading.timings["tokenize"] = job.queued_at - started
            self._batcher.put(job)
        except Exception as error:  # noqa: BLE001 - the caller of the future gets it
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    # -- streams

    def open_session(self, options: CheckOptions | None = None) -> "Session":
        """Opens a stream. Raises NotFound (a domain) and Exhausted (too many open streams)."""
        options = options or CheckOptions()
        domains = self._domains(options)
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

    @property
    def queue_depth(self) -> int:
        return self._batcher.depth

    @property
    def open_sessions(self) -> int:
        return len(self._sessions)

    def close(self) -> None:
        """Ends the worker after the batch in hand; what still waits is cancelled."""
        self._texts.shutdown(wait=True, cancel_futures=True)
        self._batcher.close()

    def _sweep(self) -> None:
        oldest = time.monotonic() - self.config.sessions.idle_seconds
        with self._lock:
            expired = [s for s in self._sessions if s.last_used < oldest]
        for session in expired:
            session.expire()

    def _forget(self, session: "Session") -> None:
        with self._lock:
            self._sessions.discard(session)

    # -- features

    def features(self, *, domain: str = "", subdomain: str = "", hook_point: str = "") -> list[Feature]:
        """Raises NotFound for a domain, sub-domain or hook point that no latent of the pack has."""
        known = {
            "domain": {d for line in self.pack.latents for d in line.domains} | set(self.pack.domains),
            "subdomain": {d for line in self.pack.latents for d in line.subdomains},
            "hook_point": {p.name for p in self.pack.hook_points},
        }
        for key, value in (("domain", domain), ("subdomain", subdomain), ("hook_point", hook_point)):
            if value and value not in known[key]:
                expected = ", ".join(sorted(known[key]))
                raise NotFound(f"unknown {key.replace('_', ' ')} {value!r}, expected one of: {expected}")
        return [
            self._feature(row)
            for row, line in enumerate(self.pack.latents)
            if (not domain or domain in line.domains)
            and (not subdomain or subdomain in line.subdomains)
            and (not hook_point or hook_point == line.hook_point)
        ]

    def feature(self, latent: LatentId) -> Feature:
        """Raises NotFound for a latent that the pack does not hold."""
        for row, line in enumerate(self.pack.latents):
            if (line.hook_point, line.latent) == (latent.hook_point, latent.index):
                return self._feature(row)
        raise NotFound(f"unknown latent {latent}: pack {self.pack.manifest.id} holds no such row")

    def _feature(self, row: int) -> Feature:
        line = self.pack.latents[row]
        rows = next(p for p in self.pack.hook_points if p.name == line.hook_point)
        local = int(np.flatnonzero(rows.latents == line.latent)[0])
        return Feature(
            latent=LatentId(line.hook_point, line.latent),
            name=self._names[row],
            explanation=line.explanation,
            domains=line.domains,
            subdomains=line.subdomains,
            firing_rate=line.firing_rate,
            threshold=float(rows.threshold[local]),
            scale=float(rows.scale[local]),
            scores=dict(line.scores),
            top_tokens=line.top_tokens,
            examples=tuple(TokenExample(e.text, e.start, e.end, e.activation) for e in line.examples),
            head_weights={
                head.name: float(weight)
                for head, weight in zip(self.pack.manifest.heads, self.pack.head_weights[:, row], strict=True)
                if weight
            },
        )

    # -- input

    def _domains(self, options: CheckOptions) -> tuple[str, ...]:
        if not 0 <= options.max_attributions <= MAX_ATTRIBUTIONS:
            raise InvalidInput(
                f"max_attributions: found {options.max_attributions}, expected 0 to {MAX_ATTRIBUTIONS}",
                reason="INVALID_OPTION",
            )
        for domain in options.domains:
            if domain not in self.pack.domains:
                raise NotFound(
                    f"unknown domain {domain!r}, expected one of: {', '.join(self.pack.domains)}",
                    reason="UNKNOWN_DOMAIN",
                )
        return tuple(dict.fromkeys(options.domains)) or self.pack.domains

    def _check_input(self, given: CheckInput) -> None:
        texts = [given.prompt] if isinstance(given.prompt, str) else [m.content for m in given.prompt or ()]
        if given.prompt is None and given.completion is None:
            raise InvalidInput("found neither a prompt nor a completion", reason="EMPTY_TEXT")
        if isinstance(given.prompt, tuple) and len(given.prompt) > self.config.limits.messages:
            raise InvalidInput(
                f"chat: found {len(given.prompt)} messages, the limit is {self.config.limits.messages}"
                " (limits.messages)",
                reason="TOO_MANY_MESSAGES",
            )
        self._check_texts("prompt", texts, required=given.prompt is not None)
        self._check_texts("completion", [given.completion or ""], required=given.completion is not None)

    def _check_texts(self, name: str, texts: Sequence[str], *, required: bool) -> None:
        size = 0
        for text in texts:
            check_text(text)
            size += len(text.encode())
        if size > self.config.limits.text_bytes:
            raise InvalidInput(
                f"{name}: found {size} bytes, the limit is {self.config.limits.text_bytes} (limits.text_bytes)",
                reason="TEXT_TOO_LARGE",
                limit=self.config.limits.text_bytes,
            )
        if required and not any(text.strip() for text in texts):
            found = "only whitespace" if any(texts) else "an empty text"
            raise InvalidInput(f"{name}: found {found}, expected text", reason="EMPTY_TEXT")

    def _tokenize(self, given: CheckInput) -> TokenSequence:
        tokens = TokenSequence()
        for piece in self._prompt_pieces(given.prompt, open_reply=given.completion is not None):
            tokens.append(piece, Phase.PROMPT)
        if given.completion is not None:
            tokens.append(self._tokenizer.text(given.completion), Phase.COMPLETION)
        return tokens

    def _prompt_pieces(self, prompt: str | tuple[Message, ...] | None, *, open_reply: bool) -> list[Piece]:
        if prompt is None:
            return []
        if isinstance(prompt, str):
            return [self._tokenizer.text(prompt)]
        return self._tokenizer.chat(prompt, open_reply=open_reply)

    # -- reading, on the worker's thread

    def _run(self, units: Sequence[_Unit]) -> None:
        started = time.perf_counter()
        read: list[Activations]
        if units[0].stream is not None:
            read = [self._reader.extend(units[0].stream, units[0].ids)]
        else:
            read = self._reader.read([unit.ids for unit in units])
        encoding = time.perf_counter()
        for unit, seen in zip(units, read, strict=True):
            unit.encoded = tuple(
                self._encode(seen[p.name][unit.skip :], rows)
                for p, rows in zip(self.pack.hook_points, self._rows, strict=True)
            )
        seconds = {"read": encoding - started, "encode": time.perf_counter() - encoding}
        for unit in units:
            unit.seconds = seconds
        self.observer.batch(len(units), sum(len(unit.ids) for unit in units), seconds)

    def _absorb(self, reading: _Reading, unit: _Unit, fresh: int, *, keep_details: bool) -> None:
        """Adds a unit's hits to the phases that its tokens belong to. `fresh`: where its first new token stands."""
        for stage, seconds in unit.seconds.items():
            reading.timings[stage] = reading.timings.get(stage, 0.0) + seconds
        count = len(unit.encoded[0].probe) if unit.encoded else 0
        phases = np.array([_PHASES[p] for p in reading.tokens.phase[fresh : fresh + count]])  # [T]
        where = np.array(reading.tokens.where[fresh : fresh + count], dtype=np.int64).reshape(-1, 3)  # [T, 3]
        hits = self._join(unit.encoded)
        for phase, state in reading.states.items():
            chosen = phases == _PHASES[phase]
            if not chosen.any():
                continue
            reading.read[phase] = reading.read.get(phase, 0) + int(chosen.sum())
            if hits is None:
                state.finite = False
                continue
            part = hits if chosen.all() else _select(hits, chosen)
            state.add(part, where[chosen])
            self.observer.hits(np.bincount(part.row, minlength=len(self._names)).tolist())
            if keep_details:
                reading.details.setdefault(phase, []).append((part, where[chosen]))

    def _join(self, encoded: Sequence[Encoded]) -> Hits | None:
        """Hits of all hook points, rows numbered through the pack; None where an activation is not finite."""
        if not all(e.finite for e in encoded):
            return None
        return Hits(
            token=np.concatenate([e.token.numpy() for e in encoded]),
            row=np.concatenate(
                [e.row.numpy() + offset for e, offset in zip(encoded, self._row_offsets, strict=False)]
            ),
            value=np.concatenate([e.value.numpy() for e in encoded]).astype(np.float64),
            probe=np.concatenate([e.probe.numpy() for e in encoded], axis=1).astype(np.float64),
        )

    # -- verdicts

    def _verdict(
        self, reading: _Reading, options: CheckOptions, domains: Sequence[str], method: str, scoring: float
    ) -> Verdict:
        missing: list[NotAssessed] = []
        phases = [self._phase(reading, phase, options, domains, missing) for phase in reading.states]
        if not phases:
            missing.append(NotAssessed(NotAssessedReason.NOTHING_READ, "no token has been read yet"))
        reading.timings["score"] = reading.timings.get("score", 0.0) + time.perf_counter() - scoring
        verdict = Verdict(
            request_id=options.request_id,
            action=worst([p.action for p in phases]),
            not_assessed=tuple(missing),
            phases=tuple(phases),
            pack=self.pack.info,
            policy=self.policy,
            model=self.model,
            timings=dict(reading.timings),
        )
        self.observer.verdict(verdict, method)
        return verdict

    def _phase(
        self,
        reading: _Reading,
        phase: Phase,
        options: CheckOptions,
        domains: Sequence[str],
        missing: list[NotAssessed],
    ) -> PhaseVerdict:
        state = reading.states[phase]
        read = reading.read.get(phase, 0)
        verdicts: tuple[DomainVerdict, ...] = ()
        tokens: tuple[TokenDetail, ...] = ()
        action = Action.NOT_ASSESSED
        if not state.finite:
            detail = "the model's activations hold NaN or infinity"
            missing.append(NotAssessed(NotAssessedReason.NON_FINITE, detail, phase))
        elif not read:
            missing.append(NotAssessed(NotAssessedReason.NOTHING_READ, "no token has been read yet", phase))
        else:
            verdicts = self.heads.verdicts(state, domains, options.max_attributions)
            action = worst([v.action for v in verdicts])
            tokens = tuple(
                token
                for hits, where in reading.details.get(phase, [])
                for token in self.heads.token_details(state, hits, where, domains)
            )
        return PhaseVerdict(phase, action, read, read + reading.held.get(phase, 0), verdicts, tokens)


class Session:
    """One stream: a prompt and then its completion, chunk by chunk. Earlier chunks are never read again.

    Chunks may be fed without waiting for the verdict of the one before; they are read in order. The last word of a
    chunk is held until the next chunk, or `last`, settles how it is split into tokens.
    """

    def __init__(self, assessor: Assessor, options: CheckOptions, domains: Sequence[str]) -> None:
        self._assessor, self._options, self._domains = assessor, options, domains
        self._reading = _Reading(TokenSequence(), {})
        self._stream: Stream | None = None
        self._window: Window | None = None
        self._read_to = 0
        self._text: dict[Phase, str] = dict.fromkeys(Phase, "")  # held: not yet settled into tokens
        self._taken: dict[Phase, int] = dict.fromkeys(Phase, 0)  # characters settled
        self._bytes = 0
        self._fed_phase: Phase | None = None
        self._ended: set[Phase] = set()
        self._chat: tuple[Message, ...] | None = None
        self._waiting: deque[tuple[Callable[[], None], Future[Verdict]]] = deque()
        self._busy = False
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
        self._grow(text)
        self._fed_phase = phase
        if phase is Phase.COMPLETION:
            self._ended.add(Phase.PROMPT)
        if last:
            self._ended.add(phase)
        return self._enqueue(lambda: self._take(phase, text, last=last))

    def feed_chat(self, messages: tuple[Message, ...]) -> "Future[Verdict]":
        """The whole prompt as a chat. Raises InvalidInput where something has been fed before."""
        if self._fed_phase is not None:
            raise InvalidInput("a chat must come before every other chunk of its stream", reason="PHASE_ENDED")
        self._assessor._check_input(CheckInput(prompt=messages))
        self._fed_phase = Phase.PROMPT
        self._ended.add(Phase.PROMPT)
        return self._enqueue(lambda: self._take_chat(messages))

    def close(self) -> None:
        """Frees the stream's cache; chunks that still wait are cancelled."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
        for _, future in waiting:
            future.cancel()
        self._stream = None
        self._assessor._forget(self)

    def expire(self) -> None:
        self._expired = True
        self.close()

    def _grow(self, text: str) -> None:
        self._bytes += len(text.encode())
        limit = self._assessor.config.limits.text_bytes
        if self._bytes > limit:
            raise InvalidInput(
                f"stream: found {self._bytes} bytes, the limit is {limit} (limits.text_bytes)",
                reason="TEXT_TOO_LARGE",
                limit=limit,
            )

    def _enqueue(self, take: Callable[[], None]) -> "Future[Verdict]":
        if self._expired:
            seconds = self._assessor.config.sessions.idle_seconds
            raise SessionExpired(f"the stream stood idle for more than {seconds:g} s and was closed")
        if self._closed:
            raise InvalidInput("the stream is closed", reason="STREAM_CLOSED")
        self.last_used = time.monotonic()
        self._assessor._batcher.admit()
        future: Future[Verdict] = Future()
        future.add_done_callback(lambda _: self._assessor._batcher.release())
        with self._lock:
            self._waiting.append((take, future))
        self._advance()
        return future

    def _advance(self) -> None:
        """Starts the next chunk where none is being read: one at a time keeps them in order."""
        with self._lock:
            if self._busy or not self._waiting:
                return
            self._busy = True
            take, future = self._waiting.popleft()
        self._assessor._texts.submit(self._start, take, future)

    def _start(self, take: Callable[[], None], future: "Future[Verdict]") -> None:
        future.add_done_callback(self._next)
        try:
            started = time.perf_counter()
            self._reading.timings = {}
            take()
            units: list[tuple[_Unit, int]] = list(self._units())
            self._reading.timings["tokenize"] = time.perf_counter() - started
            job: Job

            def finish() -> Verdict:
                self._reading.timings["queue"] = (job.started_at or job.queued_at) - job.queued_at
                scoring = time.perf_counter()
                self._reading.details.clear()  # a running verdict details the tokens of its own chunk
                for unit, fresh in units:
                    self._assessor._absorb(self._reading, unit, fresh, keep_details=self._options.token_detail)
                self.last_used = time.monotonic()
                return self._assessor._verdict(self._reading, self._options, self._domains, "watch", scoring)

            job = Job(deque(unit for unit, _ in units), lambda unit: len(unit.ids), finish, future, alone=True)
            if units:
                self._assessor._batcher.put(job)
            elif future.set_running_or_notify_cancel():
                future.set_result(finish())
        except Exception as error:  # noqa: BLE001 - the caller of the future gets it
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _next(self, _done: "Future[Verdict]") -> None:
        self._busy = False
        self._advance()

    def _take(self, phase: Phase, text: str, *, last: bool) -> None:
        """Moves what this chunk settles from text to tokens."""
        if phase is Phase.COMPLETION:
            self._settle(Phase.PROMPT, everything=True)
            self._open_reply()
        self._text[phase] += text
        self._settle(phase, everything=last)

    def _settle(self, phase: Phase, *, everything: bool) -> None:
        tokenizer = self._assessor._tokenizer
        held = self._text[phase]
        if phase is not self._fed_phase and not held:
            return
        if phase not in self._reading.states and held:
            self._reading.states[phase] = self._assessor.heads.new_state()
        settled = len(held) if everything else tokenizer.settled(held)
        if settled:
            self._reading.tokens.append(tokenizer.text(held[:settled]), phase, shift=self._taken[phase])
            self._taken[phase] += settled
            self._text[phase] = held = held[settled:]
        self._reading.held[phase] = len(tokenizer.text(held).ids) if held else 0

    def _take_chat(self, messages: tuple[Message, ...]) -> None:
        self._chat = messages
        self._reading.states[Phase.PROMPT] = self._assessor.heads.new_state()
        for piece in self._assessor._tokenizer.chat(messages, open_reply=False):
            self._reading.tokens.append(piece, Phase.PROMPT)

    def _open_reply(self) -> None:
        """What the chat template writes between the prompt and the assistant's answer."""
        if self._chat is None:
            return
        whole = TokenSequence()
        for piece in self._assessor._tokenizer.chat(self._chat, open_reply=True):
            whole.append(piece, Phase.PROMPT)
        self._chat = None
        behind = len(self._reading.tokens)
        if whole.ids[:behind] != self._reading.tokens.ids:
            raise InvalidInput("the model's chat template changes the prompt when a reply begins: use Check")
        opening = whole.ids[behind:]
        self._reading.tokens.append(Piece(opening, [(0, 0)] * len(opening)), Phase.PROMPT)

    def _units(self) -> "list[tuple[_Unit, int]]":
        """The unread tokens as steps of the stream, a new one wherever a window is full."""
        tokens, plan = self._reading.tokens, self._assessor._plan
        units = []
        while self._read_to < len(tokens):
            begin = self._read_to
            context: list[int] = []
            if self._window is None or self._read_to >= self._window.end:
                sink = tokens.phase[0] is not None
                self._window = plan.first(sink=sink) if self._window is None else plan.after(self._window)
                self._stream = Stream()
                context = [self._assessor._tokenizer.sink_id] * self._window.sink
                context += tokens.ids[self._window.begin : self._window.fresh]
            end = min(len(tokens), self._window.end)
            units.append((_Unit([*context, *tokens.ids[begin:end]], len(context), self._stream), begin))
            self._read_to = end
        return units


_PHASES = {None: 0, Phase.PROMPT: 1, Phase.COMPLETION: 2}


def _select(hits: Hits, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> Hits:
    """The hits of some tokens of a run, renumbered."""
    kept = chosen[hits.token]
    number = np.cumsum(chosen) - 1
    return Hits(number[hits.token[kept]], hits.row[kept], hits.value[kept], hits.probe[chosen])


def _encode_rows(rows: HookPointRows) -> EncodeRows:
    return EncodeRows(
        enc_rows=torch.from_numpy(rows.enc_rows),
        bias=torch.from_numpy(rows.bias),
        threshold=torch.from_numpy(rows.threshold),
        probe_rows=torch.from_numpy(rows.probe_rows),
        probe_bias=torch.from_numpy(rows.probe_bias),
    )


def _name(explanation: str, top_tokens: Sequence[str]) -> str:
    return explanation or (f"fires on: {', '.join(top_tokens[:5])}" if top_tokens else "")


__all__ = ["Assessor", "GuardError", "Observer", "Session"]
