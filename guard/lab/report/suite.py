"""The report's blocks on the suite: what it rebuilds, what it tells apart, and what the metric foresees."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Protocol, TypeVar

from guard.lab.report import plots
from guard.lab.report.analysis import place
from guard.lab.report.blocks import Block, Table, by_site, hook_points
from guard.lab.report.data import PlotData, Predicted
from guard.lab.report.plots import Line, Panel
from guard.lab.search.detect import RIVALS, Correlation, Interval, Prediction
from guard.lab.search.rank import BEST, CurvePoint, metric
from guard.lab.suite.measure import SaeReport


class _Trained(Protocol):
    """What reports and points of the curve have in common."""

    @property
    def hook_point(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def l0(self) -> float: ...


TrainedT = TypeVar("TrainedT", bound=_Trained)


def _series(saes: Sequence[TrainedT]) -> dict[tuple[str, str], dict[tuple[int, int], list[TrainedT]]]:
    """(site, architecture) -> (layer, width) -> SAEs, the sparsest first."""
    result: dict[tuple[str, str], dict[tuple[int, int], list[TrainedT]]] = {}
    for site, depths in by_site(saes).items():
        for depth, there in depths.items():
            for sae in sorted(there, key=lambda s: (s.architecture, s.width, s.l0)):
                result.setdefault((site, sae.architecture), {}).setdefault((depth, sae.width), []).append(sae)
    return result


def _against_l0(
    saes: Sequence[TrainedT], name: Callable[[TrainedT], str], y: str, value: Callable[[TrainedT], float]
) -> list[Panel]:
    panels = []
    depths = sorted({place(sae.hook_point).depth for sae in saes})
    several = len({sae.width for sae in saes}) > 1
    for (site, architecture), series in _series(saes).items():
        drawn = [
            Line(
                f"layer {depth}" + (f", {width:,} latents" if several else ""),
                [sae.l0 for sae in line],
                [value(sae) for sae in line],
                [f"{name(sae)}: L0 {sae.l0:.1f}, {y} {value(sae):.4f}" for sae in line],
                colour=depths.index(depth),
            )
            for (depth, width), line in series.items()
        ]
        panels.append(Panel(f"{site}, {architecture}", "L0", y, drawn, log_x=True))
    return panels


def suite_block(reports: Sequence[SaeReport]) -> Block:
    panels = _against_l0(reports, lambda r: r.name, "FVU", lambda r: r.fvu_typical)
    best = min(reports, key=lambda r: r.fvu_typical)
    means = {p: fmean(r.fvu_typical for r in reports if r.hook_point == p) for p in hook_points(reports)}
    hardest = max(means, key=lambda p: means[p])
    finding = (
        f"The lowest FVU is {best.fvu_typical:.3f} ({best.name}, L0 {best.l0:.1f}); the output hardest to rebuild is "
        f"{place(hardest).short}, with {means[hardest]:.3f} on average."
    )
    table = Table(
        ["SAE", "tokens", "L0", "FVU", "FVU, all tokens", "dead", "CE recovered, of nats"],
        [
            [
                r.name,
                f"{r.tokens_trained:,}",
                f"{r.l0:.1f}",
                f"{r.fvu_typical:.3f}",
                f"{r.fvu:.3f}",
                f"{r.dead_share:.1%}",
                "not measured" if r.ce is None else f"{r.ce.recovered:.1%} of {r.ce.ablated - r.ce.model:.2f}",
            ]
            for r in reports
        ],
    )
    data = PlotData[SaeReport](
        id="suite",
        title="What the SAEs rebuild, at which sparsity",
        caption="Share of variance that an SAE does not rebuild (FVU) against the latents that fire on a token (L0), "
        "on held-out activations without tokens of outsized norm; one panel a site and architecture, one line a layer.",
        n={"SAEs": len(reports), "outputs": len(means)},
        finding=finding,
        rows=list(reports),
    )
    return Block(data, [("", plots.lines(panels, key="suite", about=data.title))], [("", table)])


def curve_block(points: Sequence[CurvePoint]) -> Block:
    best = max(points, key=lambda p: p.i_cdf)
    lines = [line for series in _series(points).values() for line in series.values() if len(line) > 2]
    inner = sum(max(line, key=lambda p: p.i_cdf).sae not in {line[0].sae, line[-1].sae} for line in lines)
    drawn = [
        ("Interpretability", _against_l0(points, lambda p: p.sae, "I_CDF", lambda p: p.i_cdf)),
        ("Interpretability without chance", _against_l0(points, lambda p: p.sae, "I_CDF net", _net)),
        ("Reconstruction", _against_l0(points, lambda p: p.sae, "FVU", lambda p: p.fvu_typical)),
    ]
    data = PlotData[CurvePoint](
        id="curve",
        title="Interpretability against sparsity",
        caption="The pre-explanation metric I_CDF (mean over latents of the share of contrast pairs on which a latent "
        "fires with the concept and not without it), the same less the reverse and less what chance leaves of that "
        "(the more latents fire, the more of them part two texts by chance), and FVU, all against L0.",
        n={"SAEs": len(points)},
        finding=f"I_CDF is highest at L0 {best.l0:.1f} ({best.sae}, {best.i_cdf:.4f})"
        + (f"; {inner} of {len(lines)} lines of three SAEs or more peak between their ends." if lines else "."),
        rows=list(points),
    )
    return Block(
        data,
        [(name, plots.lines(panels, key=f"curve{i}", about=name)) for i, (name, panels) in enumerate(drawn)],
    )


def _net(point: CurvePoint) -> float:
    return metric(point, "i_cdf_net")


def prediction_block(points: Sequence[CurvePoint], prediction: Prediction) -> Block:
    auroc = {d.sae: d.auroc for d in prediction.detections}
    rows = [
        Predicted(
            sae=p.sae,
            hook_point=p.hook_point,
            l0=p.l0,
            fvu=p.fvu_typical,
            i_cdf=p.i_cdf,
            p_best=p.p_best,
            auroc=auroc[p.sae],
        )
        for p in points
        if p.sae in auroc
    ]
    panels = []
    for name, value in _PREDICTORS.items():
        drawn = [
            Line(
                site,
                [value(r) for there in depths.values() for r in there],
                [r.auroc for there in depths.values() for r in there],
                [f"{r.sae}: {name} {value(r):.4g}, AUROC {r.auroc:.3f}" for there in depths.values() for r in there],
                joined=False,
            )
            for site, depths in by_site(rows).items()
        ]
        panels.append(Panel("", name, "AUROC", drawn, log_x=name == "L0", from_zero=False))
    overall = [c for c in prediction.correlations if c.target == "*" and c.rho is not None]
    data = PlotData[Predicted](
        id="prediction",
        title="Does the metric foresee detection?",
        caption="AUROC of each SAE's latents on sources held out from the fit (mean over heads) against p_best (the "
        "share of pairs that the best latent parts, mean over sub-domains), I_CDF, FVU and L0. Below, Spearman's rank "
        "correlations over the SAEs, and how far a predictor's lies above FVU's, and above L0's, whatever their sign; "
        "95% intervals by bootstrap over whole hook points (within depth: over depths).",
        n={"SAEs": len(rows), "correlations": len(overall)},
        finding=_foresees(overall),
        rows=rows,
    )
    table = Table(
        ["predictor", "scope", "SAEs", "rho", "lead over FVU", "lead over L0"],
        [[c.predictor, c.scope, str(c.saes), _rho(c), *(_lead(c, rival) for rival in RIVALS)] for c in overall],
        2,
    )
    return Block(data, [("", plots.lines(panels, key="prediction", about=data.title))], [("Rank correlations", table)])


def _foresees(overall: Sequence[Correlation]) -> str:
    """Whether the metric that picks foresees detection better than FVU and L0 do, over the suite."""
    found = [c for c in overall if (c.predictor, c.scope) == (BEST, "suite")]
    if not found:
        return f"No rank correlation of {BEST} could be taken."
    leads = [found[0].over.get(rival) for rival in RIVALS]
    said = " and ".join(
        f"{'ahead of' if lead[1] > 0 else 'behind' if lead[2] < 0 else 'not clearly apart from'} {name}"
        for lead, name in zip(leads, ("FVU", "L0"), strict=True)
        if lead
    )
    return f"The rank correlation of {BEST} with detection is {_rho(found[0])} over the suite: " + (
        f"{said}." if said else "too few hook points to set it against FVU and L0."
    )


def _rho(c: Correlation) -> str:
    return _with_interval(c.rho or 0.0, c.interval)


def _lead(c: Correlation, rival: str) -> str:
    return _with_interval(c.over[rival][0], c.over[rival][1:]) if rival in c.over else "none"


def _with_interval(value: float, interval: Interval | None) -> str:
    return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


_PREDICTORS: dict[str, Callable[[Predicted], float]] = {
    "p_best": lambda row: row.p_best,
    "I_CDF": lambda row: row.i_cdf,
    "FVU": lambda row: row.fvu,
    "L0": lambda row: row.l0,
}
