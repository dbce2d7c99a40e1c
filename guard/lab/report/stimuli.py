"""Sentences written for the report: what they show is known, and the latents that fire on them are counted."""

import hashlib
import json
from importlib import resources
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FILES = ("entities.jsonl", "bilingual.jsonl", "known.jsonl")


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Item(_Line):
    """An entity in sentences that all name it, or a concept in sentences that show it and never name it."""

    id: str
    kind: Literal["entity", "concept"]
    group: str
    name: str
    name_zh: str
    avoid: tuple[str, ...]  # beginnings of words that a concept's sentences leave out
    en: tuple[str, ...]
    zh: tuple[str, ...]


class Translated(_Line):
    """One query in two languages; `domain` is empty for an everyday one."""

    id: str
    domain: str
    en: str
    zh: str


class Named(_Line):
    """A frame with a name that is well known, real but rare, or invented; `answer` goes on with what is true."""

    frame: str
    template: str
    kind: Literal["known", "rare", "invented"]
    name: str
    answer: str

    @property
    def prompt(self) -> str:
        return self.template.format(self.name)

    @property
    def start(self) -> int:
        """The character at which the name begins: what stands before it is the same for every name."""
        return self.template.index("{}")


def items() -> list[Item]:
    return [Item.model_validate(line) for line in _lines("entities.jsonl")]


def translated() -> list[Translated]:
    return [Translated.model_validate(line) for line in _lines("bilingual.jsonl")]


def named() -> list[Named]:
    return [Named.model_validate(line) for line in _lines("known.jsonl")]


def digest() -> str:
    """Identifies all of the sentences."""
    folder = resources.files("guard.lab").joinpath("data")
    return hashlib.sha256(b"".join(folder.joinpath(name).read_bytes() for name in FILES)).hexdigest()


def _lines(name: str) -> list[dict[str, Any]]:
    text = resources.files("guard.lab").joinpath("data", name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
