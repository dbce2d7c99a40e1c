"""A block of the report: one set of data with its caption, its plots and its tables; and what all blocks share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Generic, Protocol, TypeVar

from guard.lab.labelled import DOMAINS
from guard.lab.report.analysis import Place, place
from guard.lab.report.data import PlotData
from guard.lab.report.plots import Line, Panel
from guard.lab.search.rank import RESIDUAL
from guard.lab.suite.measure import SaeReport


@dataclass(frozen=True)
class Table:
    """Cells as they are shown. The first `words` columns are words, the rest are numbers."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


@dataclass(frozen=True)
class Block:
    data: PlotData[Any]
    plots: Sequence[tuple[str, str]] = ()  # a heading, which may be empty, and an SVG
    tables: Sequence[tuple[str, Table]] = field(default=())


class _AtHookPoint(Protocol):
    @property
    def hook_point(self) -> str: ...


RowT = TypeVar("RowT", bound=_AtHookPoint)


def hook_points(rows: Sequence[_AtHookPoint]) -> list[str]:
    """The rows' hook points: the residual stream before other sites, from the first layer to the last."""
    return sorted({row.hook_point for row in rows}, key=lambda point: _order(place(point)))


def by_site(rows: Sequence[RowT]) -> dict[str, dict[int, list[RowT]]]:
    """site -> depth -> rows, in the order of `hook_points`."""
    result: dict[str, dict[int, list[RowT]]] = {}
    for point in hook_points(rows):
        there = place(point)
        result.setdefault(there.site, {}).setdefault(there.depth, []).extend(r for r in rows if r.hook_point == point)
    return result


def comparable(reports: Sequence[SaeReport]) -> set[str]:
    """SAEs by which layers can be compared: those of the configurations that stand at every layer of their site.

    A configuration is an architecture, a width and an L0. Where none stands at every layer, the one that stands at the
    most says which layers are compared.
    """
    result: set[str] = set()
    for depths in by_site(reports).values():
        standing: dict[tuple[str, int, float], dict[int, str]] = {}
        for depth, there in depths.items():
            for report in there:
                standing.setdefault((report.architecture, report.width, report.l0_target), {})[depth] = report.name
        most = max(standing.values(), key=len).keys()
        result |= {at[depth] for at in standing.values() if most <= at.keys() for depth in most}
    return result


@dataclass(frozen=True)
class Measure(Generic[RowT]):
    label: str
    value: Callable[[RowT], float]
    dashed: bool = False
    colour: int | None = None


def over_depth(rows: Sequence[RowT], measures: "Sequence[Measure[RowT]]", y: str) -> list[Panel]:
    """A panel a site: each measure's mean over the SAEs of a layer."""
    panels = []
    for site, depths in by_site(rows).items():
        drawn = []
        for measure in measures:
            values = [[measure.value(row) for row in there] for there in depths.values()]
            titles = [
                f"{measure.label}, layer {depth}: {fmean(v):.3g} (mean of {len(v)} SAEs, {min(v):.3g} to {max(v):.3g})"
                for depth, v in zip(depths, values, strict=True)
            ]
            means = [fmean(v) for v in values]
            drawn.append(Line(measure.label, list(depths), means, titles, measure.dashed, colour=measure.colour))
        panels.append(Panel(site, "layer", y, drawn, ticks=tuple(depths)))
    return panels


def domains_in_order(names: Sequence[str]) -> list[str]:
    """Each once: the four that Guard knows first, then others by name."""
    return sorted(set(names), key=lambda n: (DOMAINS.index(n) if n in DOMAINS else len(DOMAINS), n))


def percent(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "none"


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _order(there: Place) -> tuple[bool, str, int]:
    return there.site != RESIDUAL, there.site, there.depth
