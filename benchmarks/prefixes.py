"""A chat of some 600 tokens whose last turn changes: read anew each time, and with what it shares kept."""

from pathlib import Path

from benchmarks.figures import Report, interleaved
from benchmarks.given import assessing, furthest, text_of
from guard.assessor.prefixes import Prefixes
from guard.config import PrefixesConfig
from guard.records import CheckInput, Message, Role

SYSTEM, TURN, LAST = 400, 80, 24  # tokens
TOLERANCE = 1e-4
BAR = 2.0


def run(report: Report, pack: Path, repeats: int) -> None:
    with assessing(pack, "float32") as (assessor, _):
        tokenizer = assessor.pipeline.tokenizer
        begin = [Message(Role.SYSTEM, text_of(tokenizer, SYSTEM))]
        for number, role in enumerate((Role.USER, Role.ASSISTANT)):
            begin.append(Message(role, text_of(tokenizer, TURN, skip=20 * (number + 1))))
        chats = [
            CheckInput((*begin, Message(Role.USER, text_of(tokenizer, LAST, skip=number))))
            for number in range(2 * repeats + 4)
        ]
        none, some = Prefixes(PrefixesConfig(limit=0)), Prefixes(PrefixesConfig())
        assessor.pipeline.prefixes = none
        expected = assessor.check(chats[1])
        assessor.pipeline.prefixes = some
        assessor.check(chats[0])
        difference = furthest(assessor.check(chats[1]), expected)
        report.notes["largest difference of a score"] = difference
        report.notes["tokens of a chat"] = float(expected.phases[0].tokens_read)
        report.notes["MB that one chat keeps"] = some.nbytes / 2 / 1e6
        if difference > TOLERANCE:
            report.refuse("with what it shares kept", f"scores differ by {difference:.2g}, expected {TOLERANCE:g}")
            return
        turns = iter(chats[2:])

        def changed(prefixes: Prefixes) -> None:
            assessor.pipeline.prefixes = prefixes
            assessor.check(next(turns))

        seconds = interleaved({"anew": lambda: changed(none), "kept": lambda: changed(some)}, repeats)
    baseline = ("read anew", seconds["anew"])
    report.add("read anew", seconds["anew"], baseline)
    report.add("with what it shares kept", seconds["kept"], baseline, "gain in speed", inverse=True, at_least=BAR)
