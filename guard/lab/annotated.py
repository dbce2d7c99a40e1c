"""Real texts that a language model annotated: the texts lie in the data folder, here is only what it said of them.

A line of `data/annotated.jsonl` names a text by its source, its id there and the hash of it, and gives its labels as
letters: `P`, `O`, `V` and `T` for the four domains, upper case where the text is harmful in it and lower case where it
is about it and harmless; `X` for harm of another kind. docs/annotating.md is what the annotator was told.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from guard.errors import InvalidInput
from guard.lab.corpus import documents
from guard.lab.labelled import ANNOTATED, Row, read_source

# Dialogues of people with an assistant, which have no labels of their own. A text's id is a hash of the document and
# what was read of it: the user's first message, or the dialogue.
DIALOGUES, DIALOGUES_LICENCE = "hh_rlhf", "MIT"
_DIALOGUES_FILE, _DIALOGUES_COUNT = Path("corpus", "safety_dialogue.txt.gz"), 2269  # what follows has other licences
_DIALOGUE_CHARACTERS = 1000  # whole turns up to here, a question and its answer at least
_LONGEST = 1400  # of question and answer, which are cut there

# Documents of a corpus, cut where their own digest says: long texts, which no labelled source has. By source: the file,
# how many of its documents (what follows has other licences), the licence.
EXCERPTS = {
    "gutenberg": (Path("corpus", "literature.txt.gz"), 840, "public domain"),
    "film_reviews": (Path("corpus", "reviews_webtext.txt.gz"), 1917, "CC BY 4.0"),
}
_EXCERPT_CHARACTERS = (400, 1200, 4000)

_LETTERS = {"p": "pornography", "o": "politics", "v": "violence", "t": "terror"}

# Its labels are used where they made heads tell better on sources that nothing is fitted on. It calls fewer texts
# terror than labelled sources do (a third of theirs), and more headlines and posts politics.
_SPOKEN = ("pornography", "violence")
_SPOKEN_IN: dict[str, tuple[str, ...]] = {
    DIALOGUES: ("pornography", "politics", "violence"),
    **dict.fromkeys(EXCERPTS, ("pornography", "politics", "violence", "terror")),
}
# Sexist posts, many of them of bodies and sex: to call these no pornography set its threshold, and told nothing.
_UNSPOKEN = {"edos_threats": ("pornography",)}


class Annotation(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    id: str
    text: str = Field(pattern="^[0-9a-f]{12}$")  # of its SHA-256
    labels: str = Field(pattern="^[Pp]?[Oo]?[Vv]?[Tt]?X?$")


def rows(data: Path, said: Sequence[Annotation] | None = None) -> list[Row]:
    """The annotated texts as rows that speak where their source does not.

    `data` holds `labelled/dev/*.jsonl` and `corpus/`. `said`: the annotations, the project's own where None.
    Raises InvalidInput where a file or a text is missing, or a text is not the one that was annotated.
    """
    found: list[Row] = []
    known: dict[str, dict[str, Row]] = {}
    for line in annotations() if said is None else said:
        if line.source not in known:
            known[line.source] = _texts(data, line.source)
        if line.id not in known[line.source]:
            raise InvalidInput(f"{data}: found no text {line.id!r} of {line.source}, which was annotated")
        row = known[line.source][line.id]
        if not hashlib.sha256(row.text.encode()).hexdigest().startswith(line.text):
            raise InvalidInput(f"{data}: text {line.id!r} of {line.source} is not the one that was annotated")
        if (spoken := relabelled(row, line.labels)) is not None:
            found.append(spoken)
    return found


def annotations() -> list[Annotation]:
    with resources.files("guard.lab").joinpath("data", "annotated.jsonl").open(encoding="utf-8") as stream:
        return [Annotation.model_validate_json(line) for line in stream]


def relabelled(row: Row, labels: str) -> Row | None:
    """The row with these labels in place of its own, in the domains that its own say nothing of; None where in none."""
    spoken = _SPOKEN_IN.get(row.source, _SPOKEN)
    shut = (*row.label_domains, *row.scope, *_UNSPOKEN.get(row.source, ()))
    open_ = [domain for domain in spoken if domain not in shut]
    letter_of = {domain: letter for letter in labels if (domain := _LETTERS.get(letter.lower(), "")) in open_}
    harmful = any(letter.isupper() for letter in letter_of.values())
    # Sources part over whether a theft or a swindle is violence, and terror may well be: nothing is claimed of those.
    scope = tuple(d for d in open_ if d != "violence" or d in letter_of or not set(labels) & set("XTt"))
    if not scope:
        return None
    return row.model_copy(
        update={
            "source": ANNOTATED + row.source,
            "label_domains": tuple(letter_of),
            "harmless_in": tuple(domain for domain, letter in letter_of.items() if letter.islower()),
            "scope": scope,
            "kind": "harmful_text" if harmful else "topical" if letter_of else "benign",
            "weak": False,
        }
    )


def licences(of_sources: dict[str, str]) -> dict[str, str]:
    """Those of the annotated sources: the texts are licensed as ever, whatever is said of them."""
    known = {DIALOGUES: DIALOGUES_LICENCE} | {name: licence for name, (_, _, licence) in EXCERPTS.items()} | of_sources
    return {ANNOTATED + name: known[name] for name in {line.source for line in annotations()} if name in known}


def _texts(data: Path, source: str) -> dict[str, Row]:
    if source in EXCERPTS:
        file, count, _ = EXCERPTS[source]
        return {row.id: row for row in (_excerpt(source, text) for text in documents(data / file)[:count])}
    if source != DIALOGUES:
        return {row.id: row for row in read_source(data / "labelled" / "dev" / f"{source}.jsonl")}
    return {
        row.id: row
        for document in documents(data / _DIALOGUES_FILE)[:_DIALOGUES_COUNT]
        for row in _of_dialogue(document)
    }


def _excerpt(source: str, document: str) -> Row:
    """The document's beginning; how much of it, the first digit of its digest tells."""
    digest = hashlib.sha256(document.encode()).hexdigest()[:16]
    size = _EXCERPT_CHARACTERS[int(digest[0], 16) % len(_EXCERPT_CHARACTERS)]
    text = document if len(document) <= size else document[:size].rpartition(" ")[0]
    return Row(id=f"{digest}/{size}", text=text, lang="en", source=source, label_domains=(), scope=(), kind="benign")


def _of_dialogue(document: str) -> Iterator[Row]:
    digest = hashlib.sha256(document.encode()).hexdigest()[:16]
    turns = re.split(r"\n(?=(?:User|Assistant): )", document)
    whole = turns[0]
    for turn in turns[1:]:
        if whole != turns[0] and len(whole) + 1 + len(turn) > _DIALOGUE_CHARACTERS:
            break
        whole += "\n" + turn
    for part, text in (("user", turns[0].removeprefix("User: ").strip()), ("dialogue", whole[:_LONGEST])):
        yield Row(
            id=f"{digest}/{part}", text=text, lang="en", source=DIALOGUES, label_domains=(), scope=(), kind="benign"
        )
