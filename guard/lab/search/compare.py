"""Compare: SAEs that are alike but for a doubling, of the tokens they were trained on or of their width.

What another day of training, or another wave of latents, is worth is read off from it: how far each measure moved. The
SAEs come from the folders of several runs of `guard lab contrast --detect`, and all must have been judged alike.
"""

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from statistics import fmean
from typing import Literal, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from guard.errors import InvalidInput, first_problem
from guard.lab.search.detect import Prediction
from guard.lab.search.rank import CurvePoint

Doubled = Literal["tokens", "width"]
MEASURES = ("fvu_typical", "i_cdf", "p_best", "auroc")
_FACTOR = (1.6, 2.5)  # what counts as a doubling: streams end at whole batches, and groups at whole shards
_JUDGED_BY = ("latents", "c", "iterations", "folds", "rows")
ReadT = TypeVar("ReadT")


class Change(BaseModel):
    before: float
    after: float
    change: float


class Doubling(BaseModel):
    """Two SAEs; `measures` by their names (see MEASURES)."""

    doubled: Doubled
    before: str
    after: str
    width: tuple[int, int]
    tokens_trained: tuple[int, int]
    measures: dict[str, Change]


class Mean(BaseModel):
    """Mean change over all pairs of a kind."""

    doubled: Doubled
    pairs: int
    change: dict[str, float]


class Comparison(BaseModel):
    """What `guard lab compare --out` writes."""

    doublings: list[Doubling]
    means: list[Mean]


def compare(folders: Sequence[Path]) -> Comparison:
    """The pairs among the SAEs of all folders.

    Raises InvalidInput for a folder without detections, for SAEs judged otherwise or given twice, and without a pair.
    """
    found: dict[tuple[str, int], tuple[Path, CurvePoint, float]] = {}
    first: tuple[Path, Prediction] | None = None
    for folder in folders:
        prediction = _read(folder / "prediction.json", TypeAdapter(Prediction))
        first = first or (folder, prediction)
        if other := [name for name in _JUDGED_BY if getattr(prediction, name) != getattr(first[1], name)]:
            raise InvalidInput(f"{folder}: judged by another {', '.join(other)} than {first[0]}; make one again")
        auroc = {d.sae: d.auroc for d in prediction.detections}
        for point in _read(folder / "curve.json", TypeAdapter(list[CurvePoint])):
            key = (point.sae, point.tokens_trained)
            if key in found:
                raise InvalidInput(
                    f"{folder}: holds {point.sae}, trained on {point.tokens_trained:,} tokens, as {found[key][0]} does"
                )
            found[key] = folder, point, auroc[point.sae]
    doublings = _doublings([(point, detected) for _, point, detected in found.values()])
    if not doublings:
        raise InvalidInput(
            f"{', '.join(map(str, folders))}: found no two SAEs of one hook point, architecture and L0 that a doubling "
            "of tokens, or of width, sets apart"
        )
    return Comparison(doublings=doublings, means=_means(doublings))


def _doublings(saes: Sequence[tuple[CurvePoint, float]]) -> list[Doubling]:
    """Each with its AUROC; those of tokens first, then by hook point."""
    result = []
    for (a, auroc_a), (b, auroc_b) in permutations(saes, 2):
        if (a.hook_point, a.architecture, a.l0_target) != (b.hook_point, b.architecture, b.l0_target):
            continue
        doubled: Doubled
        if a.width == b.width and _doubles(a.tokens_trained, b.tokens_trained):
            doubled = "tokens"
        elif a.tokens_trained == b.tokens_trained and _doubles(a.width, b.width):
            doubled = "width"
        else:
            continue
        values = zip(MEASURES, _measures(a, auroc_a), _measures(b, auroc_b), strict=True)
        result.append(
            Doubling(
                doubled=doubled,
                before=a.sae,
                after=b.sae,
                width=(a.width, b.width),
                tokens_trained=(a.tokens_trained, b.tokens_trained),
                measures={name: Change(before=x, after=y, change=y - x) for name, x, y in values},
            )
        )
    return sorted(result, key=lambda d: d.doubled)


def _doubles(before: int, after: int) -> bool:
    return _FACTOR[0] * before <= after <= _FACTOR[1] * before


def _measures(point: CurvePoint, auroc: float) -> tuple[float, ...]:
    return point.fvu_typical, point.i_cdf, point.p_best, auroc


def _means(doublings: Sequence[Doubling]) -> list[Mean]:
    kinds: dict[Doubled, list[Doubling]] = {}
    for doubling in doublings:
        kinds.setdefault(doubling.doubled, []).append(doubling)
    return [
        Mean(
            doubled=kind,
            pairs=len(there),
            change={name: fmean(d.measures[name].change for d in there) for name in MEASURES},
        )
        for kind, there in kinds.items()
    ]


def _read(file: Path, kind: TypeAdapter[ReadT]) -> ReadT:
    if not file.exists():
        raise InvalidInput(f"{file.parent}: holds no {file.name}; make one with `guard lab contrast --detect`")
    try:
        return kind.validate_json(file.read_bytes())
    except ValidationError as error:
        raise InvalidInput(f"{file}: {first_problem(error)}") from None
