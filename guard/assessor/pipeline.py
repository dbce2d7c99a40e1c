"""From tokens to a verdict: the rooms wired together, with no threads of its own."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from guard.assessor.observer import Observer
from guard.config import GuardConfig
from guard.errors import ConfigError
from guard.kernels import choice
from guard.kernels.contract import Encoded, EncodeRows
from guard.pack import catalogue
from guard.pack.loader import HookPointRows, check_model, load_pack
from guard.policy import decide
from guard.reader import weights
from guard.reader.model import Activations, TorchReader, pick_dtype
from guard.reader.sequence import TokenSequence, Window, WindowPlan, window_ids
from guard.reader.stream import Stream
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
from guard.scoring.heads import HeadSet
from guard.scoring.pooling import Hits, Ints, PhaseState


@dataclass(slots=True)
class Reading:
    """One text or stream on its way: its tokens, and the running state of each phase."""

    tokens: TokenSequence
    states: dict[Phase, PhaseState]
    read: dict[Phase, int] = field(default_factory=dict)
    held: dict[Phase, int] = field(default_factory=dict)
    details: dict[Phase, list[tuple[Hits, Ints]]] = field(default_factory=dict)
    blank: set[Phase] = field(default_factory=set)  # of which only whitespace has been settled
    failed: set[Phase] = field(default_factory=set)  # with tokens whose reading raised an error
    timings: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Unit:
    """A window to read: of a whole text, or the next tokens of a stream."""

    ids: list[int]
    skip: int  # leading tokens that are context only
    stream: Stream | None = None
    encoded: tuple[Encoded, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


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
        if config.reader.threads:
            torch.set_num_threads(config.reader.threads)
        dtype = pick_dtype(config.reader.dtype)
        self.reader_dtype = str(dtype).removeprefix("torch.")
        self.tokenizer = TextTokenizer(folder)
        self.reader = TorchReader(folder, [p.name for p in self.pack.hook_points], dtype=dtype)
        self._check_reader(config)
        self.encode = choice.choose(config.encode.backend)
        self.plan = WindowPlan(config.reader.window, config.reader.overlap)
        self.observer = Observer()
        self.rows = [encode_rows(p) for p in self.pack.hook_points]
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

    def units(self, tokens: TokenSequence) -> tuple[list[Window], list[Unit]]:
        """A whole text's windows, and the unit of reading for each."""
        windows = list(self.plan.cover(len(tokens), sink=tokens.phase[0] is not None))
        return windows, [
            Unit(window_ids(tokens.ids, w, self.tokenizer.sink_id), skip=w.fresh - w.begin + w.sink) for w in windows
        ]

    def run(self, units: Sequence[Unit]) -> None:
        """Reads and encodes one batch: whole windows together, or one step of a stream."""
        started = time.perf_counter()
        read: list[Activations]
        if units[0].stream is not None:
            read = [self.reader.extend(units[0].stream, units[0].ids)]
        else:
            read = self.reader.read([unit.ids for unit in units])
        encoding = time.perf_counter()
        for unit, seen in zip(units, read, strict=True):
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
            self.observer.hits(np.bincount(np.concatenate(rows), minlength=len(self.pack.latents)).tolist())

    def absorb_hits(
        self, reading: Reading, hits: Hits | None, fresh: int, count: int, *, keep_details: bool = False
    ) -> list[Ints]:
        """Adds the hits of `count` tokens from `fresh` on to their phases; None where they are not finite.

        Returns the rows of the hits that counted, for `count_hits`.
        """
        counted = []
        phases = np.array([_PHASES[p] for p in reading.tokens.phase[fresh : fresh + count]])  # [T]
        where = np.array(reading.tokens.where[fresh : fresh + count], dtype=np.int64).reshape(-1, 3)  # [T, 3]
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
            counted.append(part.row)
            if keep_details:
                reading.details.setdefault(phase, []).append((part, where[chosen]))
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
            tokens = tuple(
                token
                for hits, where in reading.details.get(phase, [])
                for token in self.heads.token_details(state, hits, where, domains)
            )
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


_PHASES = {None: 0, Phase.PROMPT: 1, Phase.COMPLETION: 2}


def _select(hits: Hits, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> Hits:
    """The hits of some tokens of a run, renumbered."""
    kept = chosen[hits.token]
    number = np.cumsum(chosen) - 1
    return Hits(number[hits.token[kept]], hits.row[kept], hits.value[kept], hits.probe[chosen])


def encode_rows(rows: HookPointRows) -> EncodeRows:
    """A pack's rows as the encoders take them."""
    return EncodeRows(
        enc_rows=torch.from_numpy(rows.enc_rows),
        bias=torch.from_numpy(rows.bias),
        threshold=torch.from_numpy(rows.threshold),
        probe_rows=torch.from_numpy(rows.probe_rows),
        probe_bias=torch.from_numpy(rows.probe_bias),
    )
