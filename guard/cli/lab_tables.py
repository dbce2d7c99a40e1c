"""Tables that the `guard lab` commands print."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guard.lab.heads.evaluate import Figure
    from guard.lab.search.compare import Comparison
    from guard.lab.search.contrast import ConceptContrast
    from guard.lab.search.detect import Interval, Prediction
    from guard.lab.search.precision import Summary
    from guard.lab.search.rank import CurvePoint, Ranking


def plain_table(title: str, texts: tuple[str, ...], numbers: tuple[str, ...], last: tuple[str, ...] = ()) -> Any:
    """An empty table without a frame: columns of text, of numbers set to the right, and of text again."""
    from rich.table import Table
    from rich.text import Text

    from guard.cli.terminal import visible

    table = Table(
        title=Text(visible(title), "bold"),
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
    )
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right")
    for heading in last:
        table.add_column(heading, overflow="fold")
    return table


def contrast_table(hook_point: str, contrasts: "list[ConceptContrast]") -> Any:
    """One SAE's figures: a line for each sub-domain, and one over all pairs."""
    thresholds = list(contrasts[0].l0_at)
    table = plain_table(
        hook_point, ("sub-domain",), ("pairs", "I_CDF", *(f"L0>{t}" for t in thresholds)), ("best latents",)
    )
    for c in contrasts:
        best = zip(c.best_latents[:3], c.best_p[:3], strict=True)
        table.add_row(
            "all" if c.domain == "*" else f"{c.domain}/{c.subdomain}".removesuffix("/*"),
            str(c.pairs),
            f"{c.i_cdf:.5f}",
            *(str(c.l0_at[t]) for t in thresholds),
            ", ".join(f"{latent} ({p:.2f})" for latent, p in best),
        )
    return table


def figures_table(figures: "list[Figure]") -> Any:
    """AUROC by head and source in one column for each method, and each head's mean over sources."""
    columns = list(figures[0].auroc) if figures else []
    table = plain_table("AUROC on unseen sources", ("head", "source"), ("positives", "negatives", *columns))
    heads: dict[str, list[Figure]] = {}
    for f in figures:
        heads.setdefault(f"{f.domain}.{f.head.value}" + (" in chats" if f.in_chats else ""), []).append(f)
    for name, found in heads.items():
        for f in found:
            source = f"{f.source} (weak negatives)" if f.weak_negatives else f.source
            shown = [f"{f.auroc[c]:.3f}" for c in columns]
            table.add_row(name, source, str(f.positives), str(f.negatives), *shown)
        means = [f"{sum(f.auroc[c] for f in found) / len(found):.3f}" for c in columns]
        table.add_row(name, "mean", "", "", *means, style="bold", end_section=True)
    return table


def ranking_table(points: "list[CurvePoint]", ranking: "Ranking") -> Any:
    """The suite, best first; what was picked is marked."""
    place = {p.sae: p for p in points}
    picked = set(ranking.picked.saes) if ranking.picked else set()
    table = plain_table(
        f"SAEs by {ranking.by}",
        ("SAE",),
        ("L0", "FVU", "p_best", "I_CDF", "reversed", "L0>0.2"),  # contrast.json has the rest; a terminal is narrow
        ("",),
    )
    for name in ranking.saes:
        p = place[name]
        table.add_row(
            name,
            f"{p.l0:.1f}",
            f"{p.fvu_typical:.3f}",
            f"{p.p_best:.3f}",
            *(f"{v:.5f}" for v in (p.i_cdf, p.i_cdf_reversed)),
            str(p.l0_at["0.2"]),
            "picked" if name in picked else "",
        )
    return table


def prediction_table(prediction: "Prediction") -> Any:
    """Rank correlations with detection, mean over heads, and how far a predictor is ahead of what is known anyway."""
    from guard.lab.search.detect import RIVALS

    table = plain_table(
        f"Spearman with AUROC on unseen sources, {len(prediction.detections)} SAEs "
        "(95%, bootstrap over whole hook points; within depth: over depths)",
        ("scope", "predictor"),
        ("Spearman", "lead over FVU", "lead over L0"),
    )
    for c in prediction.correlations:
        if c.target == "*":
            table.add_row(
                f"over the {c.scope}" if c.scope == "suite" else f"within {c.scope}",
                c.predictor,
                "all tied" if c.rho is None else _with_interval(c.rho, c.interval),
                *(_with_interval(c.over[r][0], c.over[r][1:]) if r in c.over else "-" for r in RIVALS),
            )
    return table


def comparison_table(comparison: "Comparison") -> Any:
    """A line for each doubling: every measure after it, and its change in brackets; then the mean changes."""
    from guard.lab.search.compare import MEASURES

    table = plain_table(
        "After a doubling, and in brackets the change by it",
        ("SAE", "doubled"),
        ("from", "to", "FVU", "I_CDF", "p_best", "AUROC"),
    )
    digits = dict(zip(MEASURES, (3, 5, 3, 3), strict=True))
    for d in comparison.doublings:
        sizes = d.tokens_trained if d.doubled == "tokens" else d.width
        shown = [f"{m.after:.{digits[name]}f} ({m.change:+.{digits[name]}f})" for name, m in d.measures.items()]
        table.add_row(d.after, d.doubled, *(f"{size:,}" for size in sizes), *shown)
    for mean in comparison.means:
        shown = [f"({change:+.{digits[name]}f})" for name, change in mean.change.items()]
        table.add_row(f"mean of {mean.pairs}", mean.doubled, "", "", *shown, style="bold")
    return table


def _with_interval(value: float, interval: "Interval | None") -> str:
    return f"{value:+.2f} " + (f"[{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else "[too few]")


def counts_table(summary: "Summary") -> Any:
    """Latents found, by domain and depth."""
    table = plain_table(
        f"Latents found at {summary.fdr:.0%} false discovery of a domain's at a depth ({summary.control.upper()})",
        ("domain",),
        ("depth", "latents", "found", "by contrast", "by labels", "by both", "surface"),
    )
    for c in summary.counts:
        if c.subdomain == "*":
            surface = str(c.surface) if summary.tokens_known else f"{c.surface}+?"
            numbers = (c.depth, c.latents, c.found, c.by_contrast, c.by_labels, c.by_both)
            table.add_row(c.domain, *(str(n) for n in numbers), surface)
    return table


def precision_table(summary: "Summary") -> Any:
    """What was chosen on one part and holds on another, by domain and depth."""
    table = plain_table(
        "Held out: tags borne out by data that did not choose them",
        ("domain", "chosen by", "judged on"),
        ("depth", "chosen", "untested", "confirmed (by chance)"),
    )
    for p in summary.precision:
        untested, confirmed, chance = ["-" if v is None else f"{v:.0%}" for v in (p.untested, p.confirmed, p.expected)]
        domain, depth = ("all", "all") if p.depth is None else (p.domain, str(p.depth))
        table.add_row(domain, p.chosen_by, p.judged_on, depth, str(p.chosen), untested, f"{confirmed} ({chance})")
    return table
