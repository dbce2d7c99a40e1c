"""Exit codes, for scripts. Every command uses these and no others."""

from guard.records import Action

ALLOW = 0
ERROR = 1
USAGE = 2
FLAG = 10
BLOCK = 11
NOT_ASSESSED = 12
INTERRUPTED = 130

HELP = (
    "Exit status: 0 allow, 10 flag, 11 block, 12 not assessed, 2 usage error, 1 any other error, 130 Ctrl-C "
    "(one line on stderr; GUARD_DEBUG=1 shows the traceback)."
)


def of(action: Action) -> int:
    return {Action.ALLOW: ALLOW, Action.FLAG: FLAG, Action.BLOCK: BLOCK, Action.NOT_ASSESSED: NOT_ASSESSED}[action]
