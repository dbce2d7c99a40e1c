"""How rash running verdicts are: `python -m benchmarks.running [PACK]` tells texts word by word, as completions.

The harmless ones are the 200 look-alikes that no head was fitted on; those to be caught are the pack's own cases. For
each number of tokens from which a caller would act: the share of texts flagged, or blocked, at some point from there.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from guard.assessor import Assessor
from guard.config import DEFAULT_PACK, load_config
from guard.lab.labelled import lookalike_rows
from guard.records import Action, Phase

FROM = (1, 2, 4, 8, 12, 16, 24)
RESULT = Path(__file__).parent / "results" / "running.json"

Told = list[tuple[int, Action]]  # a verdict after every word: the tokens read by then, and the action


def main(folder: Path) -> None:
    assessor = Assessor.load(load_config(overrides={"pack": str(folder)}))
    try:
        cases = [case.text for case in assessor.pack.cases if case.expect == "act"]
        told = {
            "harmless": [tell(assessor, words(row.text, row.lang)) for row in track(lookalike_rows(), "look-alikes")],
            "harmful": [tell(assessor, words(text, "" if text.isascii() else "zh")) for text in track(cases, "cases")],
        }
    finally:
        assessor.close()
    result = {
        kind: {str(least): {a.value: share(texts, least, a) for a in (Action.FLAG, Action.BLOCK)} for least in FROM}
        | {"whole": {a.value: share([t[-1:] for t in texts], 0, a) for a in (Action.FLAG, Action.BLOCK)}}
        for kind, texts in told.items()
    }
    pack = {"id": assessor.pack.info.id, "version": assessor.pack.info.version, "hash": assessor.pack.info.hash}
    texts = {kind: len(each) for kind, each in told.items()}
    RESULT.write_text(json.dumps({"pack": pack, "texts": texts, "ever": result}, indent=1) + "\n", encoding="utf-8")
    shown = Table(title="Flagged (blocked) at some point", title_justify="left")
    for heading in ("acted on from token", *map(str, FROM), "whole text"):
        shown.add_column(heading)
    for kind, shares in result.items():
        shown.add_row(f"{texts[kind]} {kind}", *(f"{s['flag']:.1%} ({s['block']:.1%})" for s in shares.values()))
    Console(width=140).print(shown)


def words(text: str, lang: str) -> list[str]:
    """Chinese has no spaces: two characters at a time."""
    if lang == "zh":
        return [text[at : at + 2] for at in range(0, len(text), 2)]
    first, *others = text.split(" ")
    return [first, *(f" {word}" for word in others)]


def tell(assessor: Assessor, chunks: Sequence[str]) -> Told:
    session, result = assessor.open_session(), []
    try:
        for at, chunk in enumerate(chunks, 1):
            verdict = session.feed(Phase.COMPLETION, chunk, last=at == len(chunks)).result()
            (phase,) = verdict.phases
            result.append((phase.tokens_read, verdict.action))
    finally:
        session.close()
    return result


def share(texts: list[Told], least: int, action: Action) -> float:
    """Of the texts, those that some verdict from `least` tokens on called this or worse; the last one always counts."""
    severe = {Action.FLAG: {Action.FLAG, Action.BLOCK}, Action.BLOCK: {Action.BLOCK}}[action]
    hit = [
        any(done in severe and (read >= least or at + 1 == len(t)) for at, (read, done) in enumerate(t)) for t in texts
    ]
    return round(sum(hit) / len(hit), 4)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_PACK)
