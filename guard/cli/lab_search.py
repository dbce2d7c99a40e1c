"""`guard lab contrast | candidates`: what a suite's SAEs and latents hold, before anything is explained."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from guard.lab.search.detect import Prediction
    from guard.lab.search.precision import Summary
    from guard.lab.search.rank import CurvePoint, Ranking

_CONTRAST_EPILOG = """\b
Examples:
  guard lab contrast --saes runs/saes --texts runs/texts --activations runs/activations --out runs/contrast
  guard lab contrast --saes runs/saes --texts runs/texts --out runs/contrast --detect

I_CDF: mean share of pairs in which a latent fires on the text with the concept and not on the one without; reversed:
the two exchanged; shuffled: against another pair's text; excess: the mean of forward less reversed, cut at 0.
L0>t: latents for which that share is above t.
Picked: the site, architecture, width and L0 with the best mean rank over the depths, among BatchTopK and JumpReLU."""

_CANDIDATES_EPILOG = """\b
Examples:
  guard lab candidates --saes runs/saes --texts runs/texts --out runs/candidates.jsonl
  guard lab candidates --saes runs/saes --name model.layers.14.batch_topk.w2304.l32 --texts runs/texts \\
      --out runs/layer14.jsonl --fdr 0.01 --control by

Found at the false-discovery rate within each domain and depth, over all of its SAEs. `confirmed`: what half of the
pairs, or of the groups of sources, chose and the other half bears out (same sign, p <= 0.05)."""

Saes = Annotated[Path, typer.Option(metavar="FOLDER", help="What `guard lab train` wrote.")]
Texts = Annotated[Path, typer.Option(metavar="FOLDER", help="What `guard lab harvest --labelled` wrote.")]
Activations = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="What `guard lab harvest --corpus` wrote; needed the first time."),
]


def register(app: typer.Typer) -> None:
    app.command(epilog=_CONTRAST_EPILOG)(contrast)
    app.command(epilog=_CANDIDATES_EPILOG)(candidates)


def contrast(
    saes: Saes,
    texts: Texts,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where figures (JSON) and the curve (PNG) go.")],
    activations: Activations = None,
    by: Annotated[
        str,
        typer.Option(metavar="METRIC", help="Ranks the SAEs: i_cdf, i_cdf_excess, i_cdf_net, i_cdf_sum, l0_0.2 ..."),
    ] = "i_cdf",
    detect: Annotated[
        bool, typer.Option("--detect", help="Also ask whether the metric predicts detection on unseen sources.")
    ] = False,
    latents: Annotated[int, typer.Option(metavar="N", min=1, help="With --detect: latents of each head.")] = 128,
) -> None:
    """Rank SAEs by how their latents tell a concept from its absence, over the project's own pairs of sentences."""
    from guard.cli import terminal
    from guard.cli.lab_stages import contrast_table
    from guard.cli.progress import Progress
    from guard.lab.search import stages

    with Progress("pool", "shards") as progress:
        found, points, ranking = stages.contrast(
            saes=saes, texts=texts, out=out, activations=activations, by=by, progress=progress.update
        )
    shown = ranking.picked.saes if ranking.picked else ranking.saes[:1]
    for sae in shown:
        terminal.out().print(contrast_table(sae, [c for c in found if c.sae == sae]))
    terminal.out().print(ranking_table(points, ranking))
    if pick := ranking.picked:
        target = f", L0 {pick.l0_target:g}" if pick.l0_target is not None else ""
        typer.echo(
            f"picked by {by}: {pick.site}, {pick.architecture}, width {pick.width:,}{target} "
            f"(mean rank {pick.mean_rank:.2f} of {len(ranking.configurations)} over {len(pick.depths)} depths)"
        )
    if detect:
        from guard.lab.search.detect import DetectConfig

        with Progress("detect", "SAEs") as progress:
            prediction = stages.predict(
                saes=saes,
                texts=texts,
                contrasted=out,
                config=DetectConfig(latents=latents),
                progress=progress.update,
            )
        terminal.out().print(prediction_table(prediction))
    typer.echo(f"{out}: {len(points)} SAEs, {len(found)} concepts")


def candidates(
    saes: Saes,
    texts: Texts,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the candidates go, as JSON lines.")],
    name: Annotated[
        list[str] | None, typer.Option("--name", metavar="SAE", help="May be repeated. Default: the whole suite.")
    ] = None,
    activations: Activations = None,
    fdr: Annotated[float, typer.Option(metavar="X", min=0.0, max=1.0, help="False-discovery rate.")] = 0.05,
    control: Annotated[
        str, typer.Option(metavar="HOW", help="bh (Benjamini-Hochberg) or by (-Yekutieli: any dependence).")
    ] = "bh",
    surface_shards: Annotated[
        int, typer.Option(metavar="N", min=1, help="Shards of the texts that surface forms are looked for in.")
    ] = 6,
) -> None:
    """Find the latents that hold safety concepts, with false discoveries held down."""
    from guard.cli import terminal
    from guard.cli.options import UsageError
    from guard.cli.progress import Progress
    from guard.lab.search import stages

    if control not in {"bh", "by"}:
        raise UsageError(f"--control: found {control!r}, expected bh or by")
    with Progress("candidates", "steps") as progress:
        summary = stages.candidates(
            saes=saes,
            texts=texts,
            out=out,
            names=name or (),
            activations=activations,
            fdr=fdr,
            control="by" if control == "by" else "bh",
            surface_shards=surface_shards,
            progress=progress.update,
        )
    terminal.out().print(counts_table(summary))
    terminal.out().print(precision_table(summary))
    if not summary.tokens_known:
        typer.echo("surface forms by token: not known, the shards of the texts hold no token ids")
    typer.echo(f"{out}: {sum(1 for _ in out.open(encoding='utf-8')):,} candidates of {len(summary.saes)} SAEs")


def ranking_table(points: "list[CurvePoint]", ranking: "Ranking") -> Any:
    """The suite, best first; what was picked is marked."""
    from guard.cli.lab_stages import _table

    place = {p.sae: p for p in points}
    picked = set(ranking.picked.saes) if ranking.picked else set()
    table = _table(
        f"SAEs by {ranking.by}",
        ("SAE",),
        ("L0", "FVU", "I_CDF", "reversed", "excess", "L0>0.2"),  # contrast.json has the rest; a terminal is narrow
        ("",),
    )
    for name in ranking.saes:
        p = place[name]
        table.add_row(
            name,
            f"{p.l0:.1f}",
            f"{p.fvu_typical:.3f}",
            *(f"{v:.5f}" for v in (p.i_cdf, p.i_cdf_reversed, p.i_cdf_excess)),
            str(p.l0_at["0.2"]),
            "picked" if name in picked else "",
        )
    return table


def prediction_table(prediction: "Prediction") -> Any:
    """Rank correlations with detection, mean over heads, of each predictor in each scope."""
    from guard.cli.lab_stages import _table

    found = [c for c in prediction.correlations if c.target == "*"]
    scopes = list(dict.fromkeys(c.scope for c in found))
    table = _table(
        f"Spearman with AUROC on unseen sources, {len(prediction.detections)} SAEs (95%, bootstrap over SAEs)",
        ("predictor",),
        tuple(f"over the {s}" if s == "suite" else f"within {s}" for s in scopes),
    )
    for predictor in dict.fromkeys(c.predictor for c in found):
        line = [next(c for c in found if (c.predictor, c.scope) == (predictor, s)) for s in scopes]
        table.add_row(
            predictor,
            *(
                "all tied" if c.rho is None or c.interval is None
                else f"{c.rho:+.2f} [{c.interval[0]:+.2f}, {c.interval[1]:+.2f}]"
                for c in line
            ),
        )  # fmt: skip
    return table


def counts_table(summary: "Summary") -> Any:
    """Candidates by domain and depth."""
    from guard.cli.lab_stages import _table

    table = _table(
        f"Candidates at {summary.fdr:.0%} false discovery ({summary.control.upper()})",
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
    from guard.cli.lab_stages import _table

    table = _table(
        "Held out: tags borne out by data that did not choose them",
        ("domain", "chosen by", "judged on"),
        ("depth", "chosen", "same sign", "confirmed", "by chance"),
    )
    for p in summary.precision:
        shown = ["-" if v is None else f"{v:.0%}" for v in (p.same_sign, p.confirmed, p.expected)]
        domain, depth = ("all", "all") if p.depth is None else (p.domain, str(p.depth))
        table.add_row(domain, p.chosen_by, p.judged_on, depth, str(p.chosen), *shown)
    return table
