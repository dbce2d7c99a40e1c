"""From tokens to a verdict: the rooms wired together, with no threads of its own."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from guard.assessor import engine
from guard.assessor.observer import Observer
from guard.assessor.prefixes import Prefix, Prefixes
from guard.config import GuardConfig
from guard.errors import ConfigError
from guard.kernels.contract import Encoded
from guard.pack import catalogue
from guard.pack.loader import check_model, load_pack
from guard.policy import decide
from guard.reader import weights
from guard.reader.contract import Activations, Growing
from guard.reader.sequence import TokenSequence, WindowPlan, window_ids
from guard.reader.tokens import Piece, TextTokenizer
from guard.records import (
    Action,
    CheckInput,
    CheckOptions,
    DomainVerdict,
    Message,
    NotAssessed,
    NotAssessedReason,
    Phase,
    PhaseVerdict,
    TokenDetail,
    Verdict,
    worst,
)
from guard.scoring.heads import HeadSet, Run
from guard.scoring.phase import PhaseState
from guard.scoring.pooling import Hits, Ints


@dataclass(slots=True)
class Reading:
    """One text or stream on its way: its tokens, and the running state of each phase."""

    tokens: TokenSequence
    states: dict[Phase, PhaseState]
    read: dict[Phase, int] = field(default_factory=dict)
    held: dict[Phase, int] = field(default_factory=dict)
    details: dict[Phase, list[Run]] = field(default_factory=dict)
    blank: set[Phase] = field(default_factory=set)  # of which only whitespace has been settled
    failed: set[Phase] = field(default_factory=set)  # with tokens whose reading raised an error
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Unit:
    """A window to read: of a whole text, or the next tokens of a stream."""

    ids: list[int]
    skip: int  # leading tokens that are context only
    stream: Growing | None = None
    begins: tuple[Prefix, int] | None = None  # what a stream that has read nothing is to begin with
    encoded: tuple[Encoded, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Plan:
    """The units of a whole text, and beside each where its first new token stands."""

    known: list[tuple[Unit, int]] = field(default_factory=list)  # of which nothing is left to read
    reads: list[tuple[Unit, int]] = field(default_factory=list)
    chat: tuple[list[int], int, Growing] | None = None  # ids, skip and stream of its first window, where it is kept
    first: int = 0  # how many of `reads` are of that window


class Pipeline:
    """A pack, a reader and an encoder, loaded together. `run` belongs to one thread, the rest to any.

    Raises ConfigError, PackError and WeightsError; fetches the default model's weights where they are absent.
    """

    def __init__(self, config: GuardConfig, *, report: Callable[[str], None]) -> None:
        if config.reader.overlap > config.reader.window // 2:
            raise ConfigError(
                f"reader.overlap: found {config.reader.overlap}, expected at most {config.reader.window // 2}, "
                f"half of reader.window"
            )
        self.pack = load_pack(config.pack)
        folder = weights.resolve(config.reader.model, report=report)
        self.model = check_model(self.pack, weights.fingerprint(folder), config.reader.allow_unverified)
        own = {head.name: (head.flag_at, head.block_at) for head in self.pack.manifest.heads}
        chosen = decide.thresholds(own, config.policy)
        self.policy = decide.info(config.policy, chosen)
        names = tuple(catalogue.name(line) for line in self.pack.latents)
        self.heads = HeadSet(self.pack, chosen, decide.decide, names)
        self.tokenizer = TextTokenizer(folder)
        # On a thread that ends. OpenMP gives each thread that multiplies helpers of its own, for as long as it lives;
        # once all are more than the cores it lets them sleep between products: 16 tokens took 1.4 times as long.
        with ThreadPoolExecutor(1, "guard-load") as loader:
            started = loader.submit(engine.start, config, folder, self.pack).result()
        self.reader, self.reader_dtype = started.reader, started.dtype
        self.encode, self.rows = started.encode, started.rows
        self._check_reader(config)
        self.plan = WindowPlan(config.reader.window, config.reader.overlap)
        self._step = config.reader.step_tokens
        self.prefixes = Prefixes(config.prefixes)
        self.observer = Observer()
        self._row_offsets = np.cumsum([0, *(len(p.latents) for p in self.pack.hook_points)])

    def _check_reader(self, config: GuardConfig) -> None:
        expected, positions = self.pack.manifest.model.d_model, self.reader.positions
        if self.reader.d_model != expected:
            raise ConfigError(
                f"reader.model {config.reader.model!r}: found d_model {self.reader.d_model}, expected {expected} "
                f"(pack {self.pack.manifest.id})"
            )
        if positions is not None and config.reader.window > positions:
            raise ConfigError(
                f"reader.window: found {config.reader.window}, expected at most {positions}, the model's positions"
            )

    def tokenize(self, given: CheckInput) -> TokenSequence:
        tokens = TokenSequence()
        for piece in self._prompt_pieces(given.prompt, open_reply=given.completion is not None):
            tokens.append(piece, Phase.PROMPT)
        if given.completion is not None:
            tokens.append(self.tokenizer.text(given.completion), Phase.COMPLETION)
        return tokens

    def _prompt_pieces(self, prompt: str | tuple[Message, ...] | None, *, open_reply: bool) -> list[Piece]:
        if prompt is None:
            return []
        if isinstance(prompt, str):
            return [self.tokenizer.text(prompt)]
        return self.tokenizer.chat(prompt, open_reply=open_reply)

    def plan_of(self, tokens: TokenSequence, *, chat: bool) -> "Plan":
        """How a whole text is read: its windows, long ones in several steps, and what a chat kept before spares."""
        plan = Plan()
        for window in self.plan.cover(len(tokens), sink=tokens.phase[0] is not None):
            ids = window_ids(tokens.ids, window, self.tokenizer.sink_id)
            skip = window.fresh - window.begin + window.sink
            kept = chat and self.prefixes.enabled and not window.begin
            stream = self.reader.new_stream() if kept or len(ids) > self._step else None
            begin, begins = 0, None
            if kept and stream is not None:
                begins = self.prefixes.find(ids, skip)
                self.observer.prefix(begins[1] if begins else 0)
                if begins is not None:
                    begin = begins[1]
                    plan.known.append((Unit([], 0, encoded=begins[0].first(begin)), window.fresh))
                plan.chat = (ids, skip, stream)
            for at in range(begin, len(ids), self._step):
                part = ids[at : at + self._step]
                unit = Unit(part, min(max(0, skip - at), len(part)), stream, begins if at == begin else None)
                plan.reads.append((unit, window.fresh + max(0, at - skip)))
                plan.first += stream is not None and plan.chat is not None and plan.chat[2] is stream
        return plan

    def keep(self, plan: "Plan") -> None:
        """Keeps the chat that was read by this plan, for others that begin alike."""
        if plan.chat is not None:
            ids, skip, stream = plan.chat
            runs = [unit.encoded for unit, _ in (*plan.known, *plan.reads[: plan.first])]
            self.prefixes.keep(ids, skip, stream, runs)

    def run(self, units: Sequence[Unit]) -> None:
        """Reads and encodes one batch: whole windows together, and steps of streams together."""
        started = time.perf_counter()
        whole = [unit for unit in units if unit.stream is None]
        steps = [unit for unit in units if unit.stream is not None]
        for unit in steps:
            if unit.begins is not None and unit.stream is not None:
                prefix, length = unit.begins
                unit.stream.take(prefix.stream, length)
        read: list[Activations] = []
        if whole:
            read += self.reader.read([unit.ids for unit in whole])
        if steps:
            read += self.reader.extend([(unit.stream, unit.ids) for unit in steps])
            for unit in steps:
                unit.stream = unit.begins = None  # whoever goes on with it holds it: a window read to its end is let go
        encoding = time.perf_counter()
        for unit, seen in zip((*whole, *steps), read, strict=True):
            unit.encoded = tuple(
                self.encode(seen[p.name][unit.skip :], rows)
                for p, rows in zip(self.pack.hook_points, self.rows, strict=True)
            )
        seconds = {"read": encoding - started, "encode": time.perf_counter() - encoding}
        for unit in units:
            unit.seconds = seconds
        self.observer.batch(len(units), sum(len(unit.ids) for unit in units), seconds)

    def absorb(self, reading: Reading, units: Sequence[tuple[Unit, int]], *, keep_details: bool) -> None:
        """Adds each unit's hits to the phases of its tokens; beside a unit: where its first new token stands."""
        # Units of one batch share its seconds, which count once.
        for seconds in {id(unit.seconds): unit.seconds for unit, _ in units}.values():
            for stage, spent in seconds.items():
                reading.timings[stage] = reading.timings.get(stage, 0.0) + spent
        for unit, fresh in units:
            self._absorb(reading, unit, fresh, keep_details=keep_details)

    def _absorb(self, reading: Reading, unit: Unit, fresh: int, *, keep_details: bool) -> None:
        count = len(unit.encoded[0].probe) if unit.encoded else 0
        hits = self.join(unit.encoded)
        self.count_hits(self.absorb_hits(reading, hits, fresh, count, keep_details=keep_details))

    def count_hits(self, rows: Sequence[Ints]) -> None:
        if rows:
            self.observer.hits(np.bincount(np.concatenate(rows), minlength=len(self.pack.latents)))

    def absorb_hits(
        self, reading: Reading, hits: Hits | None, fresh: int, count: int, *, keep_details: bool = False
    ) -> list[Ints]:
        """Adds the hits of `count` tokens from `fresh` on to their phases; None where they are not finite.

        Returns the rows of the hits that counted, for `count_hits`.
        """
        counted = []
        phases = reading.tokens.phase[fresh : fresh + count]
        where = reading.tokens.places(fresh, fresh + count)
        for phase in dict.fromkeys(phases):
            if phase is None or phase not in reading.states:
                continue
            read = phases.count(phase)
            reading.read[phase] = reading.read.get(phase, 0) + read
            state = reading.states[phase]
            if hits is None:
                state.finite = False
                continue
            part, places = hits, where
            if read < count:
                chosen = np.array([p is phase for p in phases])
                part, places = hits.of(chosen), where[chosen]
            if keep_details:
                reading.details.setdefault(phase, []).append(Run(state.tokens, part, places))
            state.add(part, places)
            counted.append(part.row)
        return counted

    def join(self, encoded: Sequence[Encoded]) -> Hits | None:
        """Hits of all hook points, rows numbered through the pack; None where an activation is not finite."""
        if not all(e.finite for e in encoded):
            return None
        return Hits(
            token=np.concatenate([np.asarray(e.token) for e in encoded]),
            row=np.concatenate(
                [np.asarray(e.row) + offset for e, offset in zip(encoded, self._row_offsets, strict=False)]
            ),
            value=np.concatenate([np.asarray(e.value) for e in encoded]).astype(np.float64),
            probe=np.concatenate([np.asarray(e.probe) for e in encoded], axis=1).astype(np.float64),
        )

    def verdict(
        self, reading: Reading, options: CheckOptions, domains: Sequence[str], method: str, scoring: float
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
        reading: Reading,
        phase: Phase,
        options: CheckOptions,
        domains: Sequence[str],
        missing: list[NotAssessed],
    ) -> PhaseVerdict:
        state = reading.states[phase]
        read = reading.read.get(phase, 0)
        problem = _problem(reading, phase)
        if problem is not None:
            missing.append(problem)
        verdicts: tuple[DomainVerdict, ...] = ()
        tokens: tuple[TokenDetail, ...] = ()
        if state.finite and read and phase not in reading.blank:
            verdicts = self.heads.verdicts(state, domains, options.max_attributions)
            if phase in reading.details:
                tokens = tuple(self.heads.token_details(state, reading.details[phase], domains))
        action = worst([*(v.action for v in verdicts), *([Action.NOT_ASSESSED] if problem else [])])
        return PhaseVerdict(phase, action, read, read + reading.held.get(phase, 0), verdicts, tokens)


def _problem(reading: Reading, phase: Phase) -> NotAssessed | None:
    if phase in reading.failed:
        detail = "the model or the encoder raised an error, which Guard's log holds"
        return NotAssessed(NotAssessedReason.READER_FAILED, detail, phase)
    if not reading.states[phase].finite:
        return NotAssessed(NotAssessedReason.NON_FINITE, "the model's activations hold NaN or infinity", phase)
    if not reading.read.get(phase, 0):
        return NotAssessed(NotAssessedReason.NOTHING_READ, "no token has been read yet", phase)
    if phase in reading.blank:
        return NotAssessed(NotAssessedReason.NOTHING_READ, "only whitespace has been read yet", phase)
    return None
