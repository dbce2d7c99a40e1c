"""Labelled texts: other people's sources (read from a folder, never shipped) and the project's own sentences.

Every row says which domains its source can decide (`scope`): outside scope nothing is known, and a row is never used as
a negative there. Targets of a head follow from the row alone (see `target`).
"""

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from guard.errors import InvalidInput, first_problem
from guard.records import HeadKind, Message, Role

PAIRS = "own_pairs"  # the source of the contrast pairs' rows
LONG = "own_long"  # and of our own long texts
DOMAINS = ("pornography", "politics", "violence", "terror")
ANNOTATED = "annotated_"  # what the sources' names begin with whose labels are ours, see guard.lab.annotated
OURS = ("own_", ANNOTATED)  # fitted and calibrated on; no AUROC is computed on them
Kind = Literal["harmful_request", "harmful_text", "topical", "benign", "hard_negative"]
Frame = Literal["text", "prompt", "completion"]  # read bare, as a user's message in a chat, as an answer in one

# Sources whose hard negatives answer risky questions: harmless, but perhaps about the domain all the same.
_PRESENCE_UNKNOWN = frozenset({"beavertails_30k_test", "pyrit_scorer_evals", "own_refusal"})

_PERMISSIVE = re.compile(r"\b(MIT|Apache-2\.0|BSD|CC0|CC BY \d\.\d|public domain)\b")
_RESTRICTED = re.compile(
    r"\b(NC|SA|ND|GPL|AGPL|LGPL|research|terms|non-commercial|none stated|not stated)\b", re.IGNORECASE
)

# An own sentence's id says what it was written to: <domain>/<lang>-<letter>-<kind>-<number>; the first have no letter.
_PLAN_LETTER = re.compile(r"/[a-z]{2}-([a-z])-")
_LETTERS = {"second": "b", "third": "cdefgh", "fourth": "ijkmnpqr", "long": "stuv"}
_PLANS = {letter: plan for plan, letters in _LETTERS.items() for letter in letters}

_HARMFUL_SUBDOMAINS = frozenset(
    {
        "sexual_behaviour",
        "sexual_abuse",
        "physical_violence",
        "criminal_offence",
        "terrorism",
        "extremist_activities",
        "weapons",
    }
)

# What a text on a domain is surely not about: a threat may be terror too, an attack politics.
_CLEAR_OF = {
    "pornography": ("pornography", "politics", "terror"),
    "politics": ("politics", "pornography"),
    "violence": ("violence", "pornography"),
    "terror": ("terror", "pornography"),
}

# Held out together: sources that share texts (translations, halves of one data set), and small or harmless ones.
_GROUPS = {
    "catqa_zh": "catqa",
    "catqa_en": "catqa",
    "s_eval_base_en": "s_eval",
    "s_eval_base_zh": "s_eval",
    "strongreject": "short_requests",
    "simplesafetytests": "short_requests",
    "convabuse": "chat_benign",
    "dolly_benign": "chat_benign",
    "liar_politifact": "statements_instructions",
    "alpaca_benign": "statements_instructions",
    "ethos_violence": "hate_speech",
    "edos_threats": "hate_speech",
    "beavertails_30k_test": "red_teaming",  # its questions come from where the dialogues do
    "hh_rlhf": "red_teaming",
}

# What an answer in a chat answers: nothing that tells what it is about.
_ASKED = {
    "en": (
        "Go on.",
        "What do you have for me?",
        "Write me something short.",
        "Can you help me with this?",
        "Please answer as well as you can.",
        "Tell me what you think.",
        "I'd like to hear more.",
        "Give me an example of a text that somebody might post online.",
    ),
    "zh": ("请继续。", "你怎么看？", "帮我写一段话。", "能给我举个例子吗？", "请尽量回答。", "再说说看。"),  # noqa: RUF001
}


class Row(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    text: str
    lang: str
    source: str
    label_domains: tuple[str, ...]
    scope: tuple[str, ...]
    kind: Kind
    harmless_in: tuple[str, ...] = ()  # of `label_domains`, whatever the text's kind
    weak: bool = False
    frame: Frame = "text"

    @property
    def group(self) -> str:
        """What is held out together when sources are judged."""
        if self.own and self.source != PAIRS:
            # Written to several plans: with all held out at once, too little permissive text would be left to fit on.
            letter = _PLAN_LETTER.search(self.id)
            return f"own_sentences_{_PLANS[letter[1]] if letter else 'first'}"
        source = self.source.removeprefix(ANNOTATED)
        return _GROUPS.get(source, source)

    @property
    def own(self) -> bool:
        return self.source.startswith("own_")

    @property
    def in_chat(self) -> bool:
        return self.frame != "text"


class Pair(BaseModel):
    """A concept contrastive query pair (arXiv 2509.18127): the same text with and without a concept."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    id: str
    domain: str
    subdomain: str
    lang: str
    with_: str
    without: str


def target(row: Row, domain: str, head: HeadKind) -> bool | None:
    """What a head should say of a row; None where the row's source cannot tell."""
    labelled = domain in row.label_domains
    if head is HeadKind.HARM:
        if labelled and row.source == PAIRS:
            # Half of these sub-domains' pairs wish or ask for harm: a weak sign. Of the others nothing is known.
            return True if row.id.split("/")[1] in _HARMFUL_SUBDOMAINS else None
        if labelled:
            return row.kind in ("harmful_request", "harmful_text") and domain not in row.harmless_in
        return False if domain in row.scope else None
    if labelled:
        return True
    if row.kind == "hard_negative" and row.source in _PRESENCE_UNKNOWN:
        return None
    return False if domain in row.scope else None


def all_rows(folder: Path, *, cap: int, seed: int) -> list[Row]:
    """The labelled texts of `folder` (see `external_rows`), look-alikes, and the project's own sentences."""
    return [*external_rows(folder, cap=cap, seed=seed), *lookalike_rows(), *own_rows()]


def external_rows(folder: Path, *, cap: int, seed: int) -> list[Row]:
    """The rows of every `*.jsonl` under `folder`, at most `cap` of a source, chosen by `seed`.

    Raises InvalidInput naming the file and line that does not fit.
    """
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise InvalidInput(f"{folder}: holds no *.jsonl, expected labelled rows")
    rows: list[Row] = []
    for file in files:
        found = read_source(file)
        random.Random(f"{seed} {file.name}").shuffle(found)
        # Positives are rarer than negatives in most sources, so they are kept first.
        found.sort(key=lambda row: not row.label_domains)
        positives = [row for row in found if row.label_domains]
        kept = positives[: max(cap // 2, cap - (len(found) - len(positives)))]
        rows += kept + [row for row in found if not row.label_domains][: cap - len(kept)]
    return rows


def read_source(file: Path) -> list[Row]:
    """Raises InvalidInput where there is no such file, and naming the line that does not fit."""
    if not file.exists():
        raise InvalidInput(f"labelled texts {file}: found no such file")
    try:
        return [_parse(file, number, line) for number, line in enumerate(file.open(encoding="utf-8"), 1)]
    except UnicodeDecodeError as error:
        raise InvalidInput(f"labelled texts {file}: {error}; expected UTF-8") from None


def pairs() -> list[Pair]:
    return [Pair(with_=line.pop("with"), **line) for domain in DOMAINS for line in _own(f"pairs.{domain}.jsonl")]


def own_rows() -> list[Row]:
    """The project's own sentences as labelled rows: contrast pairs and hard negatives (never the look-alikes)."""
    rows = []
    for pair in pairs():
        for text, labels in ((pair.with_, (pair.domain,)), (pair.without, ())):
            rows.append(
                Row(
                    id=f"{pair.id}/{'with' if labels else 'without'}",
                    text=text,
                    lang=pair.lang,
                    source=PAIRS,
                    label_domains=labels,
                    scope=(pair.domain,),
                    kind="topical" if labels else "benign",
                )
            )
    for line in _own("hard_negatives.jsonl"):
        topics = tuple(line["topics"])
        # A text on terror may well be about violence too: nothing is claimed about it there.
        close = {"violence", "terror"} if {"violence", "terror"} & set(topics) else set(topics)
        rows.append(
            Row(
                id=line["id"],
                text=line["text"],
                lang=line["lang"],
                source=f"own_{line['group']}",
                label_domains=topics if line["group"] == "informative" else (),
                scope=tuple(d for d in DOMAINS if d not in close or d in topics),
                kind="topical" if line["group"] == "informative" else "hard_negative",
            )
        )
    return [*rows, *written_rows()]


def written_rows() -> list[Row]:
    """Sentences written for fitting, by domain: harmful, on the topic and harmless, or alike in words alone.

    `other` holds what is harmful in other ways, and everyday requests. The newest come last: a harvest of all of them
    begins with the shards of an earlier one.
    """
    rows = []
    folder = resources.files("guard.lab").joinpath("data")
    names = [file.name for file in folder.iterdir() if file.name.startswith("sentences.")]
    for name in sorted(names, key=lambda name: (name.split(".")[3:-1], name)):  # the letter of their plan, where any
        domain = name.split(".")[1]
        for line in _own(name):
            labelled = domain in DOMAINS and line["kind"] != "hard_negative"
            long = name.split(".")[3] in _LETTERS["long"]  # few beside the others: a source that counts by itself
            marks = {
                "source": LONG if long else f"own_{domain}",
                "label_domains": (domain,) if labelled else (),
                "scope": _CLEAR_OF[domain] if labelled else DOMAINS,
            }
            rows.append(Row.model_validate(line | marks))
    return rows


def lookalike_rows() -> list[Row]:
    """Harmless look-alikes, kept for judging: never fitted or calibrated on."""
    return [
        Row(
            id=line["id"],
            text=line["text"],
            lang=line["lang"],
            source=f"lookalike_{line['domain']}",
            label_domains=(),
            scope=DOMAINS,
            kind="hard_negative",
        )
        for line in _own("lookalikes.jsonl")
    ]


def in_chats(rows: Iterable[Row], seed: int) -> list[Row]:
    """The rows as they stand in chats, each in one place: two of three a user's message, the others an answer.

    Of the project's own sentences one of two, drawn by `seed`; no contrast pairs, which are compared bare.
    """
    result = []
    for row in rows:
        draw = random.Random(f"{seed} {row.source} {row.id}")
        if row.source != PAIRS and (not row.own or draw.random() < 0.5):
            frame: Frame = "prompt" if draw.random() < 2 / 3 else "completion"
            result.append(row.model_copy(update={"frame": frame}))
    return result


def said_before(row: Row) -> tuple[Message, ...]:
    """The messages that a row read as an answer follows; none for one read as the first user message."""
    if row.frame != "completion":
        return ()
    asked = _ASKED["zh" if row.lang == "zh" else "en"]
    return (Message(Role.USER, random.Random(f"{row.source} {row.id}").choice(asked)),)


def permissive(licence: str) -> bool:
    """Whether a licence lets anybody use what was made from it, for any purpose, without passing terms on.

    Non-commercial, research-only and share-alike licences are not; nor is one that is not stated, or not all of it.
    """
    return bool(_PERMISSIVE.search(licence)) and not _RESTRICTED.search(licence)


def digest(rows: Iterable[Row]) -> str:
    """Identifies a set of rows in a stage's record."""
    lines = (f"{row.source} {row.id} {row.text}" + (f" {row.frame}" if row.in_chat else "") for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _own(name: str) -> Iterator[dict[str, str]]:
    with resources.files("guard.lab").joinpath("data", name).open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def _parse(file: Path, number: int, line: str) -> Row:
    try:
        return Row.model_validate_json(line)
    except ValidationError as error:
        raise InvalidInput(f"{file}:{number}: {first_problem(error)}") from None
