"""Plots as SVG that stands inside a page: its colours follow the page's light or dark, its text stays text."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

# Okabe and Ito's colours, which people with any colour vision tell apart; the page names a lighter set for the dark.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56708a")
MARKERS = ("o", "s", "^", "D", "v", "P")
_INK, _FAINT = "#010101", "#020202"  # stand for the page's own colours until the SVG is done
_WIDTH = 5.0  # inches: small enough that the text can be read on a phone
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "guard",
    "text.parse_math": False,  # names come from files, and a $ in one is a $
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _INK),
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
}


@dataclass(frozen=True)
class Line:
    label: str
    x: Sequence[float]
    y: Sequence[float]
    titles: Sequence[str] = ()  # what hovering over each point says
    dashed: bool = False
    joined: bool = True
    colour: int | None = None  # of SERIES; by its place in the panel where not given


@dataclass(frozen=True)
class Panel:
    title: str
    x: str
    y: str
    lines: list[Line]
    log_x: bool = False
    from_zero: bool = True
    ticks: Sequence[float] = field(default=())


def lines(panels: Sequence[Panel], *, key: str, about: str) -> str:
    """Panels one under the other. `key` tells one plot of a page from another, `about` is what it is read out as."""
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    with _styled():
        figure = Figure(figsize=(_WIDTH, 0.3 + 0.1 * len(labels) + 2.5 * len(panels)), layout="constrained")
        titles: dict[str, Sequence[str]] = {}
        handles: dict[str, Any] = {}
        for row, panel in enumerate(panels):
            axes = figure.add_subplot(len(panels), 1, row + 1)
            for index, line in enumerate(panel.lines):
                drawn = _draw(axes, line, labels.index(line.label))
                drawn.set_gid(f"dots-{row}-{index}")
                titles[f"dots-{row}-{index}"] = line.titles or [line.label] * len(line.y)
                handles.setdefault(line.label, drawn)
            _frame(axes, panel)
        if len(labels) > 1:
            figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=2)
        return _svg(figure, key, about, titles)


def _draw(axes: Any, line: Line, number: int) -> Any:
    """The line's points, and what joins them; `number` is its label's among those of the plot."""
    colour = SERIES[(number if line.colour is None else line.colour) % len(SERIES)]
    if line.joined:
        axes.plot(line.x, line.y, color=colour, linewidth=1.6, linestyle="--" if line.dashed else "-")
    filling = "none" if line.dashed else colour
    return axes.scatter(
        line.x, line.y, s=22, marker=MARKERS[number % len(MARKERS)], facecolor=filling, edgecolor=colour
    )


def _frame(axes: Any, panel: Panel) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    if panel.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    if panel.ticks:
        axes.set_xticks(list(panel.ticks))
    if panel.from_zero:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def heat(
    rows: Sequence[str], columns: Sequence[str], values: NDArray[np.float64], *, x: str, key: str, about: str
) -> str:
    """`values [rows, columns]`, each written in its cell; nan leaves a cell empty."""
    from matplotlib import colormaps

    with _styled():
        figure = Figure(figsize=(_WIDTH, 1.4 + 0.27 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        most = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
        for (row, column), value in np.ndenumerate(values):
            if np.isnan(value):
                continue
            shade = value / most if most > 0 else 0.0
            axes.add_patch(_cell(column, row, colormaps["cividis"](shade), f"{rows[row]}, {columns[column]}"))
            light = "#ffffff" if shade < 0.55 else "#000000"
            axes.text(column, row, _short(value), ha="center", va="center", color=light, fontsize=8)
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel=x)
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return _svg(figure, key, about, {})


def bars(rows: Sequence[str], parts: Mapping[str, Sequence[float]], *, x: str, key: str, about: str) -> str:
    """One bar a row, from the top, made up of the parts."""
    with _styled():
        figure = Figure(figsize=(_WIDTH, 1.1 + 0.3 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        left = np.zeros(len(rows))
        for index, (label, sizes) in enumerate(parts.items()):
            axes.barh(range(len(rows)), sizes, left=left, color=SERIES[index % len(SERIES)], label=label, height=0.7)
            left += np.asarray(sizes, dtype=np.float64)
        axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=x)
        axes.set_yticks(range(len(rows)), rows)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        if len(parts) > 1:
            figure.legend(loc="outside upper left", ncols=2)
        return _svg(figure, key, about, {})


def scatter(
    points: NDArray[np.float64],
    groups: Sequence[str],
    titles: Sequence[str],
    order: Sequence[str],
    *,
    key: str,
    about: str,
) -> str:
    """`points [n, 2]`, coloured and shaped by group; hovering over one shows its title."""
    with _styled():
        figure = Figure(figsize=(_WIDTH, _WIDTH), layout="constrained")
        axes = figure.add_subplot()
        named = np.asarray(groups)
        said: dict[str, Sequence[str]] = {}
        for index, group in enumerate(order):
            chosen = np.flatnonzero(named == group)
            if not len(chosen):
                continue
            dots = axes.scatter(
                points[chosen, 0],
                points[chosen, 1],
                s=22,
                marker=MARKERS[index % len(MARKERS)],
                color=SERIES[index % len(SERIES)],
                alpha=0.8,
                linewidth=0,
                label=f"{group} ({len(chosen)})",
            )
            dots.set_gid(f"group-{index}")
            said[f"group-{index}"] = [titles[int(i)] for i in chosen]
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(_FAINT)
            spine.set_visible(True)
        figure.legend(loc="outside upper left", ncols=2)
        return _svg(figure, key, about, said)


def _styled() -> Any:
    import matplotlib as mpl

    return mpl.rc_context(_STYLE)  # type: ignore[arg-type]  # its keys are literals


def _cell(column: int, row: int, colour: Any, label: str) -> Any:
    from matplotlib.patches import Rectangle

    cell = Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, facecolor=colour, edgecolor="none")
    cell.set_label(label)
    return cell


def _short(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def _svg(figure: Figure, key: str, about: str, titles: Mapping[str, Sequence[str]]) -> str:
    """Text of one `<svg>` element whose ids no other plot of the page has."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    root = ET.fromstring(stream.getvalue())  # noqa: S314 - matplotlib wrote it a line above
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", about)
    groups = {group.get("id"): group for group in root.iter(f"{{{_SVG}}}g")}
    for gid, texts in titles.items():
        for dot, text in zip(_dots(groups[gid]), texts, strict=True):
            ET.SubElement(dot, f"{{{_SVG}}}title").text = text
    for element in root.iter():
        for name, value in element.attrib.items():
            element.set(name, _own(name, value, key))
    return ET.tostring(root, encoding="unicode")


def _dots(group: ET.Element) -> list[ET.Element]:
    """The points of a scatter: copies of one shape, or, where it has one point and no filling, the shape itself."""
    return list(group.iter(f"{{{_SVG}}}use")) or group.findall(f"{{{_SVG}}}path")


def _own(name: str, value: str, key: str) -> str:
    """An attribute's value with the page's colours, and with ids, and what points to them, under `key`."""
    if name == "id":
        return f"{key}-{value}"
    if name == f"{{{_XLINK}}}href" and value.startswith("#"):
        return f"#{key}-{value[1:]}"
    if name == "style":
        value = _themed(value)
    return value.replace("url(#", f"url(#{key}-")


def _themed(style: str) -> str:
    style = style.replace(_INK, "currentColor").replace(_FAINT, "var(--faint, #cccccc)")
    for index, colour in enumerate(SERIES):
        style = style.replace(colour, f"var(--series-{index}, {colour})")
    return style
