"""What is told of an observed request: how far it has come, and the verdict on it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from guard.assessor.observing import Request
from guard.assessor.pipeline import Pipeline
from guard.records import (
    Action,
    CheckOptions,
    DomainVerdict,
    NotAssessed,
    NotAssessedReason,
    Phase,
    PhaseVerdict,
    Verdict,
    worst,
)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an observed request has come. Two that are equal in `version` say the same."""

    version: int
    changes: int  # of its actions
    prompt_read: int
    completion_read: int
    finish_reason: str  # empty while it is open
    verdict: Verdict | None  # None where it was not asked for


def verdict(
    request: Request, pipeline: Pipeline, options: CheckOptions, least_tokens: int, domains: Sequence[str] = ()
) -> Verdict:
    """As in reader mode, with the severest action that each domain has had, and what could not be read."""
    started = time.perf_counter()
    request.reading.timings = {"score": request.spent}
    asked = domains or pipeline.pack.domains
    plain = pipeline.verdict(request.reading, options, asked, "observe", started)
    missing = [*plain.not_assessed, *request.missing.values()]
    phases = [_severest(phase, request, asked) for phase in plain.phases]
    if (unready := request.unready(least_tokens)) is not None:
        phases = [_unjudged(phase) if phase.phase is unready.phase else phase for phase in phases]
        if unready.phase not in {why.phase for why in missing}:
            missing.append(unready)
    unread = [p for p in request.missing if p not in request.reading.states]
    phases += [PhaseVerdict(p, Action.NOT_ASSESSED, 0, 0, ()) for p in unread]
    if plain.phases == () and unread:
        missing = list(request.missing.values())
    return replace(
        plain,
        action=worst([phase.action for phase in phases]),
        not_assessed=tuple(missing),
        phases=tuple(sorted(phases, key=lambda phase: phase.phase is Phase.COMPLETION)),
        model=request.link.model,
    )


def no_rows(pipeline: Pipeline, options: CheckOptions, detail: str) -> Verdict:
    """On a request that was announced and never came."""
    return Verdict(
        request_id=options.request_id,
        action=Action.NOT_ASSESSED,
        not_assessed=(NotAssessed(NotAssessedReason.NO_ROWS, detail),),
        phases=(),
        pack=pipeline.pack.info,
        policy=pipeline.policy,
        model=pipeline.model,
    )


def _severest(phase: PhaseVerdict, request: Request, asked: Sequence[str]) -> PhaseVerdict:
    said = request.severest[phase.phase]
    # What cannot be scored any more has no domains of its own; what was said of them stands.
    scored = phase.domains or tuple(DomainVerdict(d, said[d], ()) for d in asked if d in said)
    domains = tuple(replace(d, action=worst([d.action, said.get(d.domain, d.action)])) for d in scored)
    gone = [Action.NOT_ASSESSED] if phase.phase in request.missing else []
    return replace(phase, action=worst([phase.action, *(d.action for d in domains), *gone]), domains=domains)


def _unjudged(phase: PhaseVerdict) -> PhaseVerdict:
    """Scores as they are, with no action taken from them."""
    unknown = tuple(replace(d, action=Action.NOT_ASSESSED) for d in phase.domains)
    return replace(phase, action=Action.NOT_ASSESSED, domains=unknown)
