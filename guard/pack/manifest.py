"""`manifest.toml` and the lines of `latents.jsonl` and `cases.jsonl`: the schema of a pack. No torch, no grpc."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guard.errors import PackError
from guard.records import HeadKind

T = TypeVar("T", bound=BaseModel)

FORMAT = 1
FILES = ("rows.safetensors", "latents.jsonl", "cases.jsonl", "evaluation.json", "README.md")
MANIFEST = "manifest.toml"
EXPLANATION_SCORE = "simulation_segment"  # of a latent's scores, the one that stands for its explanation


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Strict):
    name: str
    weights: str = Field(description="SHA-256 of the weights, see guard.reader.weights.fingerprint")
    tokenizer: str
    d_model: int = Field(ge=1)
    dtype: str = Field(description="dtype in which the activations were harvested")


class HookPointSection(_Strict):
    name: str
    latents: int = Field(ge=0, description="rows kept")
    probes: int = Field(ge=0)
    sae_width: int = Field(ge=1)
    sae_architecture: str
    sae_k: float
    sae_tokens: int
    fvu: float = Field(
        description="on held-out tokens, those of outsized norm left out (guard.lab.suite.train.SaeReport)"
    )
    l0: float
    dead_share: float


class HeadSection(_Strict):
    """`score = sigmoid((bias + sum of weights x pooled + sum of probe weights x pooled probes) / temperature)`."""

    domain: str
    head: HeadKind
    bias: float
    temperature: float = Field(gt=0)
    flag_at: float | None = None
    block_at: float | None = None

    @property
    def name(self) -> str:
        return f"{self.domain}.{self.head.value}"


class PoolingSection(_Strict):
    """How a phase's hits become one number a latent: `(sum of g(value) / length ** exponent) ** power`.

    g rises from 0 at the latent's threshold to 1 at its scale, so that it has no jump. `length` counts the tokens and
    `prior_tokens` that tell nothing, so that a word or two is little evidence. A phase that is longer than
    `passage_tokens` is scored passage by passage too (guard.scoring.phase); 0: only as a whole. `passage_caution` is in
    units of a logit before its temperature.
    """

    exponent: float = Field(ge=0, le=1)
    power: float = Field(1.0, gt=0, le=1)  # under 1, a few firings count for more than their share
    prior_tokens: float = Field(0.0, ge=0, allow_inf_nan=False)
    passage_tokens: int = Field(0, ge=0, multiple_of=2)
    passage_caution: float = Field(0.0, ge=0, allow_inf_nan=False)


class SourceSection(_Strict):
    name: str
    licence: str
    use: str


class ExplanationsSection(_Strict):
    """Who said what the latents stand for, and who tested it; both versions are those of the prompts."""

    annotator: str
    explained: str
    simulated: str
    least_score: float = Field(description="what an explanation had to score for its latent to be kept")


class Manifest(_Strict):
    format: int
    id: str
    version: str
    description: str
    calibrated: bool
    model: ModelSection
    pooling: PoolingSection
    hook_points: tuple[HookPointSection, ...]
    heads: tuple[HeadSection, ...]
    sources: tuple[SourceSection, ...]
    explanations: ExplanationsSection | None = None
    files: dict[str, str] = Field(description="SHA-256 of every other file of the pack")


class ExampleLine(_Strict):
    text: str
    start: int
    end: int
    activation: float


class LatentLine(_Strict):
    """A line of `latents.jsonl`; lines stand in the order of the rows."""

    hook_point: str
    latent: int
    domains: tuple[str, ...]
    subdomains: tuple[str, ...]
    explanation: str = ""
    surface_form: bool = False  # fires on a character or a token, whatever it means
    scores: dict[str, float] = {}
    firing_rate: float
    quantiles: dict[str, float] = {}
    top_tokens: tuple[str, ...] = ()
    examples: tuple[ExampleLine, ...] = ()

    @property
    def explanation_score(self) -> float | None:
        """None where there is no explanation, or none that was tested."""
        return self.scores.get(EXPLANATION_SCORE) if self.explanation else None


class CaseLine(_Strict):
    """A line of `cases.jsonl`: a text that must (`act`) or must not (`allow`) be flagged or blocked in `domain`."""

    id: str
    lang: str
    text: str
    domain: str
    expect: Literal["act", "allow"]
    known: Literal["pass", "miss"] = "pass"  # a miss is shipped as such: what the pack is known to get wrong


def read_manifest(data: bytes, file: Path) -> Manifest:
    """Raises PackError naming the file that holds `data`, the key, what was found and what was expected."""
    try:
        values = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PackError(f"{file}: {error}") from None
    if values.get("format") != FORMAT:
        raise PackError.at(file, "format", values.get("format"), FORMAT)
    return parse(Manifest, values, file)


def parse(schema: type[T], values: object, where: object) -> T:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(whole line)"
        if first["type"] == "extra_forbidden":
            known = _section(schema, first["loc"][:-1]).model_fields
            raise PackError.at(where, key, "an unknown key", f"one of {', '.join(known)}") from None
        if first["type"] == "missing":
            raise PackError.at(where, key, "nothing", "a value") from None
        raise PackError.at(where, key, repr(first["input"])[:80], first["msg"]) from None


def _section(schema: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel]:
    """The schema of what stands at `path`; numbers in it are places in a list."""
    for key in path:
        if isinstance(key, str):
            kind = schema.model_fields[key].annotation
            schema = next(k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, BaseModel))
    return schema
