"""Draw: the curve of a suite against sparsity, and detection against what may foresee it, as PNG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from guard.lab.search.contrast import ALL
from guard.lab.search.detect import Prediction, predicted
from guard.lab.search.rank import RESIDUAL, CurvePoint, metric

_DRAWN = "0.2"  # the t of the L_{0,t} that is drawn


def draw_curve(points: Sequence[CurvePoint], file: Path) -> None:
    """Interpretability against sparsity, beside reconstruction (bottom right), as PNG.

    I_CDF (top left) rises with whatever fires by chance: dashed, the same with the pairs' sides exchanged. Top right,
    what is left of it without chance.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")  # without pyplot: saved by Agg, no display, no global state
    axes = figure.subplot_mosaic([["i_cdf", "i_cdf_net"], ["l0_t", "fvu"]])
    panels: dict[str, tuple[str, Callable[[CurvePoint], float]]] = {
        "i_cdf": ("I_CDF (dashed: sides exchanged)", lambda p: p.i_cdf),
        "i_cdf_net": ("I_CDF, forward less backward, less its null", lambda p: metric(p, "i_cdf_net")),
        "l0_t": (f"$L_{{0,t}}$, t = {_DRAWN} (latents)", lambda p: p.l0_at[_DRAWN]),
        "fvu": ("FVU (share of variance not rebuilt)", lambda p: p.fvu_typical),
    }
    lines: dict[tuple[str, str, int], list[CurvePoint]] = {}
    for p in sorted(points, key=lambda p: (p.site != RESIDUAL, p.site, p.depth, p.architecture, p.width, p.l0)):
        lines.setdefault((p.hook_point, p.architecture, p.width), []).append(p)
    for name, (label, value) in panels.items():
        axis = axes[name]
        for line in lines.values():
            axis.plot([p.l0 for p in line], [value(p) for p in line], **line_style(line[0], points))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("L0 measured (latents a token)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    for line in lines.values():
        pale = {"color": line_style(line[0], points)["color"], "linestyle": (0, (2, 2)), "alpha": 0.6}
        axes["i_cdf"].plot([p.l0 for p in line], [p.i_cdf_reversed for p in line], **pale)
    axes["i_cdf"].set_title("Interpretability")
    axes["i_cdf_net"].set_title("Interpretability without chance")
    axes["fvu"].set_title("Reconstruction (typical tokens)")
    handles, labels = axes["fvu"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    figure.savefig(file, dpi=130)


def line_style(point: CurvePoint, among: Sequence[CurvePoint]) -> dict[str, Any]:
    """Colour by depth (viridis: safe for the colour-blind), marker by site, filling by architecture, size by width."""
    from matplotlib import colormaps

    viridis: Any = colormaps["viridis"]
    depths, sites = sorted({p.depth for p in among}), sorted({p.site for p in among}, key=lambda s: (s != RESIDUAL, s))
    widths = sorted({p.width for p in among})
    return {
        "color": viridis(0.9 * depths.index(point.depth) / max(len(depths) - 1, 1)),
        "marker": "os^Dv"[sites.index(point.site) % 5],
        "fillstyle": {"batch_topk": "full", "jumprelu": "none"}.get(point.architecture, "left"),
        "linestyle": {"batch_topk": "-", "jumprelu": "--"}.get(point.architecture, ":"),
        "markersize": 5 + 2 * widths.index(point.width),
        "label": f"{point.site} {point.depth}, {point.architecture}, {point.width:,}",
    }


def draw_prediction(points: Sequence[CurvePoint], prediction: Prediction, file: Path) -> None:
    """Detection against I_CDF, p_best, FVU and L0: one dot an SAE."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")  # without pyplot: saved by Agg, no display, no global state
    auroc = {d.sae: d.auroc for d in prediction.detections}
    found = {c.predictor: c for c in prediction.correlations if (c.target, c.scope) == (ALL, "suite")}
    panels: tuple[tuple[str, str], ...] = (
        ("i_cdf", "I_CDF"),
        ("p_best", "p_best (mean over sub-domains)"),
        ("-fvu_typical", "-FVU (typical tokens)"),
        ("l0", "L0 measured"),
    )
    shown: dict[str, Any] = {}
    for axis, (name, label) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for point in points:
            style = line_style(point, points) | {"linestyle": "none"}
            style["label"] = style["label"].split(",")[0]
            (dot,) = axis.plot(predicted(point, name), auroc[point.sae], **style)
            shown.setdefault(style["label"], dot)
        axis.set_xlabel(label)
        axis.set_ylabel("AUROC on unseen sources")
        axis.grid(alpha=0.3)
        c = found[name]
        if c.rho is not None and c.interval is not None:
            axis.set_title(f"Spearman {c.rho:+.2f} [{c.interval[0]:+.2f}, {c.interval[1]:+.2f}]")
    figure.legend(list(shown.values()), list(shown), loc="outside right center", fontsize="small")
    figure.savefig(file, dpi=130)
