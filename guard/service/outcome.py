"""What a stream comes to. Its verdicts are running ones: a later, milder one does not undo what an earlier one said."""

from dataclasses import replace

from guard.records import Action, Phase, PhaseVerdict, Verdict, worst


class Outcome:
    """Folds a stream's verdicts, in their order.

    A verdict that was not assessed counts while none after it was: the first words of a stream are held, not judged.
    """

    def __init__(self) -> None:
        self._assessed: dict[Phase, PhaseVerdict] = {}  # each phase's latest, its actions the severest so far

    def add(self, verdict: Verdict) -> Verdict:
        """`verdict`, with every action as severe as the severest up to now."""
        phases = self._assessed | {phase.phase: self._folded(phase) for phase in verdict.phases}
        for now in verdict.phases:
            if now.action is not Action.NOT_ASSESSED:
                self._assessed[now.phase] = phases[now.phase]
        action = worst([verdict.action, *(phase.action for phase in phases.values())])
        return replace(verdict, action=action, phases=tuple(phases.values()))

    def _folded(self, now: PhaseVerdict) -> PhaseVerdict:
        before = self._assessed.get(now.phase)
        if before is None:
            return now
        said = {domain.domain: domain.action for domain in before.domains}
        domains = tuple(replace(d, action=worst([said.get(d.domain, d.action), d.action])) for d in now.domains)
        return replace(now, action=worst([before.action, now.action]), domains=domains or before.domains)
