"""Ordinary prose that is flagged: `python -m benchmarks.prose DATA [PACK]`.

Beginnings of up to a thousand tokens: of public-domain books and film reviews, which a language model annotated and
called none of them harmful (`guard.lab.annotated`), and of encyclopaedias, news and speeches, which nobody annotated.
No head is fitted or calibrated on any of them; the SAEs were trained on these corpora.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from guard.assessor import Assessor
from guard.config import DEFAULT_PACK, load_config
from guard.lab import annotated
from guard.lab.corpus import documents
from guard.lab.labelled import ANNOTATED
from guard.records import Action, CheckInput, CheckOptions, HeadKind, Verdict

OF_EACH = 20  # texts of each source and size
# Corpora that nobody annotated, and the characters at which documents that are longer are cut.
UNANNOTATED = {
    "wikipedia_en": ("wiki_en_general.txt.gz", (400, 1200, 4000)),
    "wikipedia_zh": ("wiki_zh.txt.gz", (130, 400, 1300)),
    "news": ("news_misc.txt.gz", (400, 1200, 4000)),
    "speeches": ("political_speech.txt.gz", (400, 1200, 4000)),
}
RESULT = Path(__file__).parent / "results" / "prose.json"


def main(data: Path, folder: Path) -> None:
    chosen = _annotated(data) | _unannotated(data)
    assessor = Assessor.load(load_config(overrides={"pack": str(folder)}))
    heads = [head.name for head in assessor.pack.manifest.heads if head.head is HeadKind.HARM]
    try:
        verdicts = {
            where: [assessor.check(CheckInput(text), CheckOptions(max_attributions=0)) for text in track(texts, where)]
            for where, texts in chosen.items()
        }
    finally:
        assessor.close()
    found = {where: _figures(said, heads) for where, said in verdicts.items()}
    info = assessor.pack.info
    pack = {"id": info.id, "version": info.version, "hash": info.hash}
    RESULT.write_text(json.dumps({"pack": pack, "flagged": found}, indent=1) + "\n", encoding="utf-8")
    shown = Table(title="Prose flagged by harm heads", title_justify="left")
    for heading in ("source and characters", "texts", "tokens", *heads, "any"):
        shown.add_column(heading)
    for where, told in found.items():
        shares = [f"{told[name]:.0%}" for name in (*heads, "any")]
        shown.add_row(where, f"{told['texts']:.0f}", f"{told['tokens']:.0f}", *shares)
    Console(width=140).print(shown)


def _annotated(data: Path) -> dict[str, list[str]]:
    """Texts by source and by the size they were cut at, drawn by that."""
    by: dict[str, list[str]] = {}
    for row in annotated.rows(data, [a for a in annotated.annotations() if a.source in annotated.EXCERPTS]):
        if row.kind != "harmful_text":
            by.setdefault(f"{row.source.removeprefix(ANNOTATED)} {row.id.rpartition('/')[2]}", []).append(row.text)
    places = sorted(by, key=lambda where: (where.split()[0], int(where.split()[1])))
    return {where: random.Random(where).sample(by[where], min(OF_EACH, len(by[where]))) for where in places}


def _unannotated(data: Path) -> dict[str, list[str]]:
    found = {}
    for source, (file, sizes) in UNANNOTATED.items():
        texts = documents(data / "corpus" / file)
        for size in sizes:
            where = f"{source} {size}"
            drawn = random.Random(where).sample([text for text in texts if len(text) > size], OF_EACH)
            found[where] = [text[:size] for text in drawn]
    return found


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prose", description=__doc__)
    parser.add_argument("data", type=Path, help="the folder of the labelled data and corpora")
    parser.add_argument("pack", type=Path, nargs="?", default=DEFAULT_PACK)
    given = parser.parse_args()
    main(given.data, given.pack)
