"""What the report reads, and what it writes beside the page: the data of every plot, typed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from guard.errors import InvalidInput, first_problem
from guard.lab.search.candidates import Candidate
from guard.lab.search.detect import Prediction
from guard.lab.search.precision import Summary
from guard.lab.search.rank import CurvePoint

ReadT = TypeVar("ReadT")


def read_candidates(file: Path) -> tuple[list[Candidate], Summary]:
    """Candidates and what stands beside them. Raises InvalidInput naming the file, the line and the field."""
    summary = file.with_suffix(".summary.json")
    for absent in (file, summary):
        if not absent.is_file():
            raise InvalidInput(f"{absent}: found no such file; make one with `guard lab candidates`")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(Candidate.model_validate_json(line))
        except ValidationError as error:
            raise InvalidInput(f"{file}:{number}: {first_problem(error)}") from None
    return found, _read(summary, TypeAdapter(Summary))


def read_contrast(folder: Path) -> tuple[list[CurvePoint], Prediction | None]:
    """`curve.json`, and `prediction.json` where `guard lab contrast --detect` has written one."""
    file = folder / "curve.json"
    if not file.exists():
        raise InvalidInput(f"{folder}: holds no curve.json; make one with `guard lab contrast`")
    points = _read(file, TypeAdapter(list[CurvePoint]))
    file = folder / "prediction.json"
    return points, _read(file, TypeAdapter(Prediction)) if file.exists() else None


def _read(file: Path, adapter: TypeAdapter[ReadT]) -> ReadT:
    try:
        return adapter.validate_python(json.loads(file.read_text(encoding="utf-8")))
    except (ValidationError, json.JSONDecodeError) as error:
        if isinstance(error, json.JSONDecodeError):
            raise InvalidInput(f"{file}: {error}") from None
        raise InvalidInput(f"{file}: {first_problem(error)}") from None


RowT = TypeVar("RowT", bound=BaseModel)


class PlotData(BaseModel, Generic[RowT]):
    """`data/<id>.json`: what one plot and its table were made from."""

    id: str
    title: str
    caption: str  # what is plotted
    n: dict[str, int]
    finding: str  # one sentence, read off from the rows
    rows: Sequence[RowT]


class Predicted(BaseModel):
    """One SAE: what may foresee how well its latents detect, and how well they do."""

    sae: str
    hook_point: str
    l0: float
    fvu: float
    i_cdf: float
    p_best: float
    auroc: float


class CandidateCount(BaseModel):
    """Candidates of one SAE: `subdomain` is `*` for the whole domain, and `domain` too for all."""

    sae: str
    hook_point: str
    domain: str
    subdomain: str
    candidates: int


class TagCount(BaseModel):
    sae: str
    hook_point: str
    candidates: int
    domains: dict[int, int]  # how many carry so many domains
    subdomains: dict[int, int]
    surface: int
    not_surface: int
    surface_unknown: int


class ItemCount(BaseModel):
    """Items that have a latent of their own in one SAE, and how many such latents there are."""

    sae: str
    hook_point: str
    kind: str
    lang: str
    items: int
    items_found: int
    latents: int
    chance: float
    found: dict[str, list[int]]  # item -> its latents
    cross: int  # of `cross_of` English items that have a latent and Chinese sentences: it fires on these too
    cross_of: int


class LanguageRow(BaseModel):
    """One SAE: how alike a query and its translation are, beside other queries (`_other`)."""

    sae: str
    hook_point: str
    jaccard: float
    jaccard_other: float
    jaccard_error: float
    jaccard_found: float
    jaccard_risk: float
    jaccard_everyday: float
    cosine: float
    cosine_other: float
    cosine_found: float


class LanguageCandidate(BaseModel):
    sae: str
    hook_point: str
    latent: int
    domains: list[str]
    queries: int
    en: int
    zh: int
    language: str


class MapPoint(BaseModel):
    sae: str
    hook_point: str
    latent: int
    x: float
    y: float
    domain: str
    tags: list[str]


class KnownRow(BaseModel):
    """One SAE: latents that fire on known names and not on invented ones, and two controls."""

    sae: str
    hook_point: str
    latents: int
    swapped: int
    shuffled: float
    best: "list[KnownLatent]"


class KnownLatent(BaseModel):
    """Shares of the names, over all frames, on which a latent fires."""

    latent: int
    known: float
    rare: float
    rare_recalled: float | None
    rare_not_recalled: float | None
    invented: float


class NameRow(BaseModel):
    """A name in its frame, and what the model would say next."""

    frame: str
    prompt: str
    kind: str
    answer: str
    tokens: int
    top: str
    top_probability: float
    answer_probability: float | None
    answer_first: bool
    fires: bool | None  # the latent of the examples
