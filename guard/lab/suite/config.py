"""The suite as its file declares it: which SAEs are trained, on how much, and what each is called.

The grid is a union of products, so that a suite may be wide where it searches and narrow where it only compares.
"""

import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from guard.errors import InvalidInput

Architecture = Literal["batch_topk", "jumprelu", "topk"]
_SHIPPED = Path(__file__).parents[1] / "data" / "suites"


ACTIVATIONS = "activations.json"  # what the harvest said of itself that a suite was trained on


@dataclass(frozen=True)
class SaeSpec:
    """One SAE of a suite: the output it reads, its kind, its latents, and how many should fire on a token."""

    hook_point: str
    architecture: Architecture
    width: int
    l0: float

    @property
    def name(self) -> str:
        return f"{self.hook_point}.{self.architecture}.w{self.width}.l{self.l0:g}"

    def seed(self, suite_seed: int) -> int:
        """Of its first weights: a matter of the suite's seed and its name, not of who trains it, or what beside it."""
        return int.from_bytes(hashlib.sha256(f"{suite_seed}/{self.name}".encode()).digest()[:6], "big")


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Grid(_Options):
    """Every hook point with every architecture, width and L0 that stand here."""

    hook_points: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    architectures: tuple[Architecture, ...] = Field(("batch_topk",), min_length=1)
    widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    l0: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)

    def specs(self) -> Iterator[SaeSpec]:
        product = itertools.product(self.hook_points, self.architectures, self.widths, self.l0)
        return itertools.starmap(SaeSpec, product)


class SuiteConfig(_Options):
    """`suite.toml`. Tokens are counted over the stream, which starts again when it has been read through."""

    tokens: int = Field(5_000_000, ge=1)
    batch: int = Field(2048, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(200, ge=0)
    decay_share: float = Field(0.25, ge=0, le=1)
    dead_after_tokens: int = Field(500_000, ge=1)
    aux_every: int = Field(4, ge=1)
    shards_mixed: int = Field(8, ge=1)
    held_out_shards: int = Field(2, ge=1)
    seed: int = 0
    start_from: str = Field("", description="folder of a finished suite whose SAEs give the first weights")
    grid: tuple[Grid, ...] = Field(min_length=1)

    @property
    def specs(self) -> tuple[SaeSpec, ...]:
        return tuple(spec for grid in self.grid for spec in grid.specs())

    @property
    def hook_points(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(spec.hook_point for spec in self.specs))

    @model_validator(mode="after")
    def _check_specs(self) -> Self:
        seen = set()
        for spec in self.specs:
            if spec.name in seen:
                raise ValueError(f"found {spec.name} twice, expected each SAE once")
            seen.add(spec.name)
            if spec.l0 >= spec.width:
                raise ValueError(f"found l0 {spec.l0:g} with width {spec.width}, expected an l0 below the width")
            if spec.architecture == "topk" and spec.l0 != int(spec.l0):
                raise ValueError(f"found l0 {spec.l0:g} with topk, expected a whole number of latents")
        return self


def shipped() -> list[str]:
    """Names of the configurations that come with Guard."""
    return sorted(file.stem for file in _SHIPPED.glob("*.toml"))


def read_config(given: str) -> SuiteConfig:
    """The configuration in a TOML file, or a shipped one by its name.

    Raises InvalidInput naming the file, the key, what was found and what was expected.
    """
    file = _SHIPPED / f"{given}.toml" if given in shipped() else Path(given)
    if not file.exists():
        raise InvalidInput(
            f"{given}: found no such file, expected a suite's TOML file or one of: {', '.join(shipped())}"
        )
    try:
        return SuiteConfig.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{file}: {error}") from None
    except ValidationError as error:
        problems = [dict(problem) for problem in error.errors()]
        # A list is called too short also where its one item is faulty, which is told already.
        told = [p for p in problems if p["type"] != "too_short" or not p["input"]]
        raise InvalidInput(f"{file}: " + "; ".join(map(_explain, told))) from None


def write_config(file: Path, config: SuiteConfig) -> None:
    """`read_config` gives back what is written here."""
    values = config.model_dump(mode="json")
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if key != "grid"]
    for grid in values["grid"]:
        lines += ["", "[[grid]]", *(f"{key} = {json.dumps(value)}" for key, value in grid.items())]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _explain(problem: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "grid"
    if problem["type"] == "extra_forbidden":
        known = SuiteConfig if len(problem["loc"]) == 1 else Grid
        return f"{key}: found an unknown key, expected one of: {', '.join(known.model_fields)}"
    if problem["type"] == "missing":
        return f"{key}: found nothing, expected a value"
    if problem["type"] == "too_short":
        return f"{key}: found {problem['input']}, expected at least one"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    expected = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{key}: found {problem['input']!r}, expected {expected}"
