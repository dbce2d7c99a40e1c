"""A pack's own true and false positives, replayed: when it is built, and by `guard pack check`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from guard.pack.manifest import CaseLine
from guard.records import Action


@dataclass(frozen=True, slots=True)
class CaseResult:
    case: CaseLine
    action: Action  # in the case's own domain
    passed: bool


def replay(cases: Iterable[CaseLine], act: Callable[[str], dict[str, Action]]) -> list[CaseResult]:
    """Checks every case, in order; `act` gives a text's actions by domain.

    A text that must `act` passes where it is flagged or blocked, one that must `allow` where it is allowed. What was
    not assessed, or has no action in the case's domain, never passes.
    """
    results = []
    for case in cases:
        action = act(case.text).get(case.domain, Action.NOT_ASSESSED)
        wanted = {Action.FLAG, Action.BLOCK} if case.expect == "act" else {Action.ALLOW}
        results.append(CaseResult(case, action, passed=action in wanted))
    return results
