"""Ordinary prose that is flagged: `python -m benchmarks.prose DATA [PACK]`.

The beginnings of public-domain books and of film reviews (`guard.lab.annotated`): real texts of up to a thousand tokens
which a language model annotated, and called none of them harmful: what a harm head flags here is a mistake.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from guard.assessor import Assessor
from guard.config import DEFAULT_PACK, load_config
from guard.lab import annotated
from guard.lab.labelled import ANNOTATED, Row
from guard.records import Action, CheckInput, CheckOptions, HeadKind, Verdict

OF_EACH = 20  # texts of each source and size
RESULT = Path(__file__).parent / "results" / "prose.json"


def main(data: Path, folder: Path) -> None:
    chosen = _chosen(annotated.rows(data, [a for a in annotated.annotations() if a.source in annotated.EXCERPTS]))
    assessor = Assessor.load(load_config(overrides={"pack": str(folder)}))
    heads = [head.name for head in assessor.pack.manifest.heads if head.head is HeadKind.HARM]
    try:
        verdicts = {
            where: [
                assessor.check(CheckInput(row.text), CheckOptions(max_attributions=0)) for row in track(rows, where)
            ]
            for where, rows in chosen.items()
        }
    finally:
        assessor.close()
    found = {where: _figures(said, heads) for where, said in verdicts.items()}
    info = assessor.pack.info
    pack = {"id": info.id, "version": info.version, "hash": info.hash}
    RESULT.write_text(json.dumps({"pack": pack, "flagged": found}, indent=1) + "\n", encoding="utf-8")
    shown = Table(title="Harmless prose flagged by harm heads", title_justify="left")
    for heading in ("source and characters", "texts", "tokens", *heads, "any"):
        shown.add_column(heading)
    for where, told in found.items():
        shares = [f"{told[name]:.0%}" for name in (*heads, "any")]
        shown.add_row(where, f"{told['texts']:.0f}", f"{told['tokens']:.0f}", *shares)
    Console(width=140).print(shown)


def _chosen(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Texts by source and by the size they were cut at, drawn by that."""
    by: dict[str, list[Row]] = {}
    for row in rows:
        if row.kind != "harmful_text":
            by.setdefault(f"{row.source.removeprefix(ANNOTATED)} {row.id.rpartition('/')[2]}", []).append(row)
    return {
        where: random.Random(where).sample(those, min(OF_EACH, len(those)))
        for where, those in sorted(by.items(), key=lambda item: (item[0].split()[0], int(item[0].split()[1])))
    }


def _figures(verdicts: Sequence[Verdict], heads: Sequence[str]) -> dict[str, float]:
    flagged = dict.fromkeys((*heads, "any"), 0)
    for verdict in verdicts:
        said = {
            f"{domain.domain}.{head.head.value}"
            for domain in verdict.phases[0].domains
            for head in domain.heads
            if head.flag_at is not None and head.score >= head.flag_at
        } & set(heads)
        for name in (*said, *(["any"] if said else [])):
            flagged[name] += 1
        if verdict.action is Action.NOT_ASSESSED:
            raise RuntimeError("a text was not assessed")
    tokens = sorted(verdict.phases[0].tokens_read for verdict in verdicts)
    shares = {name: round(count / len(verdicts), 4) for name, count in flagged.items()}
    return {"texts": len(verdicts), "tokens": tokens[len(tokens) // 2], **shares}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else DEFAULT_PACK)
