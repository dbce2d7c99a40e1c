"""One observed request: its tokens in the order of their positions, and what each phase has come to."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from guard.assessor.pipeline import Pipeline, Reading
from guard.errors import InvalidInput
from guard.reader.sequence import TokenSequence
from guard.reader.turns import Template, Turns
from guard.records import Action, NotAssessed, NotAssessedReason, Phase, worst
from guard.scoring.pooling import Hits, Ints
from guard.tap.protocol import Ended, Rows

if TYPE_CHECKING:
    from guard.assessor.links import Follower, Link


LOST = "lost"  # the finish reason of a request whose tap went away, or fell silent


class Request:
    """Must be used by one thread at a time."""

    def __init__(self, request_id: str, link: "Link", template: Template, *, sink: bool) -> None:
        """`sink`: its rows begin with its first token, which draws attention whatever it is, and is not scored."""
        self.id, self.link = request_id, link
        self.reading = Reading(TokenSequence(), {})
        self.prompt_tokens: int | None = None
        self.counts = dict.fromkeys(Phase, 0)  # tokens read, template tokens included
        self.severest: dict[Phase, dict[str, Action]] = {phase: {} for phase in Phase}
        self.missing: dict[Phase, NotAssessed] = {}
        self.stopping = False  # a block of it ends its generation
        self.finish_reason = ""
        self.version = 0
        self.changes = 0  # of actions, or of what is missing
        self.spent = 0.0  # seconds
        self.last_used = time.monotonic()
        self.followers: set[Follower] = set()
        self._turns = Turns(template, sink=sink)
        self._cursor = 0  # position of the next token
        self._run: list[int] = []  # ids of the tokens before it, as far back as none is missing
        self._absorbed = 0  # of reading.tokens
        self._held: list[Hits | None] = []  # of tokens that may yet turn out to be a role line
        self._advanced: set[Phase] = set()
        self._judged: set[Phase] = set()

    @property
    def phase(self) -> Phase:
        """Of the next token."""
        known = self.prompt_tokens is not None and self._cursor >= self.prompt_tokens
        return Phase.COMPLETION if known else Phase.PROMPT

    def join(self, follower: "Follower") -> None:
        follower.request = self
        self.followers.add(follower)

    def advanced(self) -> None:
        self.version += 1
        for follower in self.followers:
            follower.wake()

    def absorb(self, pipeline: Pipeline, rows: Rows) -> tuple[int, list[Ints]]:
        """Reads what is new in a run: its tokens, counted, and the rows of hits that were scored.

        Raises InvalidInput for hits of tokens that the run, or of rows that the pack does not have.
        """
        self.last_used = time.monotonic()
        _check_range("token", rows.token, len(rows.token_ids))
        _check_range("row", rows.row, len(pipeline.pack.latents))
        count = len(rows.token_ids)
        if not self._same(rows):
            return 0, []
        self.prompt_tokens = rows.prompt_tokens
        if rows.begin > self._cursor:
            self._skip(rows.begin)
        new = rows.begin + count - self._cursor
        if new <= 0:
            return 0, []
        hits = _hits(rows, count - new) if rows.finite else None
        ids = rows.token_ids[count - new :].tolist()
        of_prompt = min(new, max(0, rows.prompt_tokens - self._cursor))
        tokens = self.reading.tokens
        for phase, part in ((Phase.PROMPT, ids[:of_prompt]), (Phase.COMPLETION, ids[of_prompt:])):
            if part:
                self._turns.append(part, phase, tokens)
                self.counts[phase] += len(part)
                self._advanced.add(phase)
        self._run += ids
        self._cursor += new
        return new, self._settle(pipeline, hits, new)

    def _same(self, rows: Rows) -> bool:
        """Whether rows that are there already are of this request: two that share an id cannot be told apart."""
        overlap = self._run[max(0, len(self._run) - max(0, self._cursor - rows.begin)) :]
        skipped = max(0, self._cursor - len(self._run) - rows.begin)
        known = rows.token_ids[skipped:].tolist()
        size = min(len(known), len(overlap))
        if self.prompt_tokens in {None, rows.prompt_tokens} and known[:size] == overlap[:size]:
            return True
        detail = "another request of the same id came while this one was open"
        for phase in Phase:
            self.fail(NotAssessed(NotAssessedReason.ROWS_MISSING, detail, phase))
        return False

    def _skip(self, begin: int) -> None:
        """Rows up to `begin` never came."""
        detail = f"rows of positions {self._cursor} to {begin - 1} never came"
        prompt_tokens = self.prompt_tokens or 0
        if self._cursor < prompt_tokens:
            self.fail(NotAssessed(NotAssessedReason.ROWS_MISSING, detail, Phase.PROMPT))
        if begin > prompt_tokens:
            self.fail(NotAssessed(NotAssessedReason.ROWS_MISSING, detail, Phase.COMPLETION))
        self._cursor, self._run = begin, []

    def _settle(self, pipeline: Pipeline, hits: Hits | None, count: int) -> list[Ints]:
        """Absorbs the hits of tokens whose phase is settled; those of a run with a token held wait for it."""
        tokens = self.reading.tokens
        if not self._held and len(tokens) - self._absorbed == count:
            return self._add(pipeline, hits, count)
        self._held.append(hits)
        return [] if self._turns.holding else self._release(pipeline)

    def _release(self, pipeline: Pipeline) -> list[Ints]:
        held, self._held = self._held, []
        finite = [part for part in held if part is not None]
        whole = _join(finite) if len(finite) == len(held) else None
        return self._add(pipeline, whole, len(self.reading.tokens) - self._absorbed)

    def _add(self, pipeline: Pipeline, hits: Hits | None, count: int) -> list[Ints]:
        reading = self.reading
        begin, self._absorbed = self._absorbed, self._absorbed + count
        for phase in dict.fromkeys(reading.tokens.phase[begin:]):
            if phase is None:
                continue
            self._advanced.add(phase)
            if phase not in reading.states:
                reading.states[phase] = pipeline.heads.new_state()
                self.changes += 1  # it has begun, and cannot be judged yet
        reading.blank = set(reading.states) - self._turns.written
        left = max(0, (self.prompt_tokens or 0) - self._cursor)
        reading.held = {Phase.PROMPT: left} if left else {}
        finite = sum(state.finite for state in reading.states.values())
        fired = pipeline.absorb_hits(reading, hits, begin, count)
        self.changes += sum(state.finite for state in reading.states.values()) != finite
        return fired

    def unready(self, least_tokens: int) -> NotAssessed | None:
        """Why the phase under way cannot be judged: the prompt is not whole, or the completion goes on and is short."""
        reading = self.reading
        if self.phase not in reading.states:
            return None
        if self.phase is Phase.PROMPT:
            detail = f"{self._cursor} of the prompt's {self.prompt_tokens} tokens have been read: it is judged whole"
        else:
            read = reading.read.get(Phase.COMPLETION, 0)
            if read >= least_tokens or self.finish_reason not in {"", LOST}:
                return None
            detail = (
                f"{read} tokens of the completion have been read, of {least_tokens} to judge it by (taps.least_tokens)"
            )
        return NotAssessed(NotAssessedReason.TOO_FEW_READ, detail, self.phase)

    def to_judge(self, least_tokens: int) -> list[Phase]:
        """Phases that advanced and can be judged: a prompt that is whole, a completion that is not too short."""
        unready = self.unready(least_tokens)
        ready = {Phase.PROMPT, Phase.COMPLETION} if self.phase is Phase.COMPLETION else set[Phase]()
        if unready is not None:
            ready.discard(unready.phase)
        advanced = self._advanced & ready
        self._advanced -= advanced
        reading = self.reading
        found = [p for p in advanced if p in reading.states and p not in reading.blank and reading.states[p].finite]
        if not self._judged.issuperset(found):
            self._judged.update(found)
            self.changes += 1  # what was not assessed is now
        return found

    def told(self, phase: Phase, actions: Mapping[str, Action]) -> bool:
        """Keeps the severest action of each domain; whether one is a block for the first time."""
        severest = self.severest[phase]
        blocked = False
        for domain, action in actions.items():
            before = severest.get(domain, Action.ALLOW)
            if worst([before, action]) is not before:
                severest[domain] = action
                self.changes += 1
                blocked = blocked or action is Action.BLOCK
        return blocked

    def miss(self, detail: str) -> None:
        self.last_used = time.monotonic()
        self.fail(NotAssessed(NotAssessedReason.ROWS_MISSING, detail, self.phase))

    def fail(self, why: NotAssessed) -> None:
        """The phase is not assessed from here on; the first reason stands."""
        if why.phase is not None and why.phase not in self.missing:
            self.missing[why.phase] = why
            self.changes += 1

    def end(self, pipeline: Pipeline, ended: Ended) -> list[Ints]:
        """No more rows come. What was held is read, and what the engine computed beyond is missing."""
        self.finish_reason = ended.reason or "stop"
        self._turns.flush(self.reading.tokens)
        fired = self._release(pipeline) if self._held else []
        if ended.tokens > self._cursor:
            if self.prompt_tokens is None:
                detail = f"none of its {ended.tokens} tokens came"
                self.fail(NotAssessed(NotAssessedReason.ROWS_MISSING, detail, Phase.PROMPT))
            else:
                self._skip(ended.tokens)
        elif self.prompt_tokens is not None and self.phase is Phase.PROMPT and self.prompt_tokens:
            detail = f"the request ended when {self._cursor} of its {self.prompt_tokens} prompt tokens had been read"
            self.fail(NotAssessed(NotAssessedReason.ROWS_MISSING, detail, Phase.PROMPT))
        return fired

    def let_go(self) -> None:
        """Frees what only more rows would need: an ended request is kept for its verdict."""
        self.reading.tokens, self._run = TokenSequence(), []


def _check_range(name: str, values: NDArray[np.int32], end: int) -> None:
    if len(values) and (values.min() < 0 or values.max() >= end):
        raise InvalidInput(f"hits: found {name} {values.min()} to {values.max()}, expected 0 to {end - 1}")


def _hits(rows: Rows, begin: int) -> Hits:
    """The hits of a run from its token `begin` on."""
    first = int(np.searchsorted(rows.token, begin)) if begin else 0
    return Hits(
        token=rows.token[first:].astype(np.int64) - begin,
        row=rows.row[first:].astype(np.int64),
        value=rows.value[first:].astype(np.float64),
        probe=rows.probe[begin:].astype(np.float64),
    )


def _join(parts: list[Hits]) -> Hits:
    starts = np.cumsum([0, *(part.tokens for part in parts)])
    return Hits(
        token=np.concatenate([part.token + start for part, start in zip(parts, starts, strict=False)]),
        row=np.concatenate([part.row for part in parts]),
        value=np.concatenate([part.value for part in parts]),
        probe=np.concatenate([part.probe for part in parts]),
    )
