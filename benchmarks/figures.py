"""Times, ratios and what is made of them: medians over interleaved repeats, each against a baseline of the same run."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from rich.table import Table

Spread = tuple[float, float, float]  # first quartile, median, third quartile


def spread(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def interleaved(
    cases: Mapping[str, Callable[[], object]], repeats: int, *, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of every case, once a round; each round starts with another case, and one round before warms up.

    `warm`: each case runs twice in a row and the second is timed, where cases would push each other out of the caches.
    """
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, repeats):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if warm:
                cases[name]()
            started = time.perf_counter()
            cases[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


@dataclass(frozen=True)
class Figure:
    """`ratio` compares with `baseline` round by round; what it says stands in `meaning`."""

    name: str
    value: Spread
    unit: str
    baseline: str
    ratio: Spread
    meaning: str
    bar: str = ""
    met: bool | None = None


@dataclass
class Report:
    suite: str
    figures: list[Figure] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # figure -> why
    notes: dict[str, float | str] = field(default_factory=dict)

    def add(
        self,
        name: str,
        seconds: Sequence[float],
        baseline: tuple[str, Sequence[float]],
        meaning: str = "time against the baseline's",
        *,
        scale: float = 1e3,
        unit: str = "ms",
        inverse: bool = False,
        paired: bool = True,
        at_least: float | None = None,
        below: float | None = None,
    ) -> None:
        """One figure. Its ratio is taken round by round; where not `paired`, against the median of the baseline.

        `inverse`: the baseline's time over this one's (a gain in speed). `scale`: from seconds to `unit`.
        """
        named, other = baseline
        if not paired:
            other = [statistics.median(other)] * len(seconds)
        ratio = spread([b / a if inverse else a / b for a, b in zip(seconds, other, strict=True)])
        bar, met = "", None
        if at_least is not None:
            bar, met = f">= {at_least:g}", ratio[1] >= at_least
        elif below is not None:
            bar, met = f"< {below:g}", ratio[1] < below
        low, middle, high = spread(seconds)
        value = (low * scale, middle * scale, high * scale)
        self.figures.append(Figure(name, value, unit, named, ratio, meaning, bar, met))

    def refuse(self, name: str, why: str) -> None:
        self.refused[name] = why

    @property
    def failed(self) -> bool:
        return bool(self.refused) or any(figure.met is False for figure in self.figures)

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def table(report: Report) -> Table:
    shown = Table(title=report.suite, title_justify="left", title_style="bold", caption_justify="left")
    for heading, justify in (("figure", "left"), ("median", "right"), ("quartiles", "right"), ("baseline", "left")):
        shown.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for heading in ("ratio", "quartiles", "bar"):
        shown.add_column(heading, justify="right")
    for f in report.figures:
        verdict = "" if f.met is None else f"[green]{f.bar} met[/]" if f.met else f"[red]{f.bar} missed[/]"
        shown.add_row(
            f.name,
            f"{f.value[1]:.3g} {f.unit}",
            f"{f.value[0]:.3g} - {f.value[2]:.3g}",
            f.baseline,
            f"{f.ratio[1]:.3g}",
            f"{f.ratio[0]:.3g} - {f.ratio[2]:.3g}",
            verdict,
        )
    for name, why in report.refused.items():
        shown.add_row(f"[red]{name}[/]", "refused", "", why, "", "", "")
    shown.caption = "\n".join(
        f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}" for key, value in report.notes.items()
    )
    return shown
