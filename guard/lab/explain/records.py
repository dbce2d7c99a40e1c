"""What the stages of this room hand to each other, and to whoever annotates: one JSON object a line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from guard.errors import InvalidInput, first_problem

Kind = Literal["top", "middle", "near_miss", "silent"]
Part = Literal["show", "test"]
T = TypeVar("T", bound=BaseModel)

EXPLANATIONS = "explanations.jsonl"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Window(_Strict):
    """A stretch of one text; in `top` and `middle` the latent fires, in `near_miss` and `silent` it does not."""

    kind: Kind
    part: Part  # shown to the explainer, or kept from it to test the explanation
    source: str  # "own" or "corpus"
    tokens: tuple[str, ...]  # joined, they are the window's text
    values: tuple[float, ...]  # strength at each token, activation / scale; 0 where silent

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def peak(self) -> float:
        return max(self.values, default=0.0)

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        if len(self.values) != len(self.tokens):
            raise ValueError(f"found {len(self.values)} values, expected one for each of {len(self.tokens)} tokens")
        return self


class Evidence(_Strict):
    """What is known of a latent before anybody explains it."""

    latent: str  # "model.layers.14/123", a guard.records.LatentId
    sae: str
    firing_rate: float
    output_tokens: tuple[str, ...]  # those whose logits the decoder direction raises most
    windows: tuple[Window, ...]

    def part(self, part: Part) -> tuple[Window, ...]:
        return tuple(window for window in self.windows if window.part == part)


class Task(_Strict):
    """What an annotator is asked."""

    id: str  # "explain/model.layers.14/123", "segment/…", "token/…", "detect/…"
    prompt: str  # version of the prompt, such as "explain-1"
    system: str
    user: str


class Answer(_Strict):
    """What came back. Tokens count every attempt; those of files are counted with the reader's tokenizer."""

    id: str
    prompt: str
    annotator: str  # a model or a person
    answer: dict[str, Any]  # the JSON object that the prompt asks for
    tokens_sent: int = Field(0, ge=0)
    tokens_received: int = Field(0, ge=0)


class OfLatent(_Strict):
    """A line about one latent."""

    latent: str  # "model.layers.14/123"
    sae: str

    @property
    def number(self) -> int:
        """Of the latent in its SAE."""
        return int(self.latent.rpartition("/")[2])


class Explanation(OfLatent):
    explanation: str
    domains: tuple[str, ...]
    subdomains: tuple[str, ...]
    confidence: float = Field(ge=0, le=1)
    surface_form: bool  # fires on a character or a token, whatever it means
    annotator: str
    prompt: str


def read(file: Path, schema: type[T]) -> list[T]:
    """The records of a JSON-lines file. Raises InvalidInput naming the file, the line and the key that does not fit."""
    if not file.exists():
        raise InvalidInput(f"{file}: found no such file, expected JSON lines")
    return [record for _, record in numbered(file, schema)]


def numbered(file: Path, schema: type[T]) -> Iterable[tuple[int, T]]:
    """As `read`, with the number of each line; empty lines are passed over."""
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, _parse(schema, line, f"{file}:{number}")


def write(file: Path, records: Iterable[BaseModel]) -> None:
    """Whole or not at all."""
    scratch = file.with_name(f".{file.name}.tmp")
    with scratch.open("w", encoding="utf-8") as stream:
        stream.writelines(record.model_dump_json() + "\n" for record in records)
    scratch.replace(file)


def _parse(schema: type[T], line: str, where: str) -> T:
    try:
        return schema.model_validate_json(line)
    except ValidationError as error:
        raise InvalidInput(f"{where}: {first_problem(error)}") from None
