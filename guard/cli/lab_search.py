"""`guard lab contrast | compare | candidates | words`: what a suite holds, before anything is explained."""

from pathlib import Path
from typing import Annotated

import typer

from guard.cli.lab_tables import (
    comparison_table,
    contrast_table,
    counts_table,
    precision_table,
    prediction_table,
    ranking_table,
)

_CONTRAST_EPILOG = """\b
Examples:
  guard lab contrast --saes runs/saes --texts runs/texts --activations runs/activations --out runs/contrast
  guard lab contrast --saes runs/saes --texts runs/texts --out runs/contrast --detect

I_CDF: mean share of pairs in which a latent fires on the text with the concept and not on the one without; reversed:
the two exchanged; shuffled: against another pair's text; excess: the mean of forward less reversed, cut at 0.
L0>t: latents for which that share is above t. p_best: the share of the best latent, mean over the sub-domains.
Picked: the site, architecture, width and L0 with the best mean rank over the depths, among BatchTopK and JumpReLU."""

_COMPARE_EPILOG = """\b
Examples:
  guard lab compare --contrast runs/contrast --contrast runs/contrast-further
  guard lab compare --contrast runs/contrast --contrast runs/contrast-further --out runs/doublings.json

Two SAEs are compared that have one hook point, architecture and L0, and one width where tokens are about doubled, one
number of tokens where the width is."""

_CANDIDATES_EPILOG = """\b
Examples:
  guard lab candidates --saes runs/saes --texts runs/texts --out runs/candidates.jsonl
  guard lab candidates --saes runs/saes --name model.layers.14.batch_topk.w2304.l32 --texts runs/texts \\
      --out runs/layer14.jsonl --fdr 0.01 --control by

Found: latents, at the false-discovery rate among those of a domain and a depth, over all of its SAEs. `confirmed`: what
half of the pairs, or of the groups of sources, chose and the other half bears out (same sign, p <= 0.05)."""

_WORDS_EPILOG = """\b
Examples:
  guard lab words --saes runs/saes --texts runs/texts --out runs/words.jsonl
  guard lab words --saes runs/saes --texts runs/texts --besides runs/pool/latents.jsonl --out runs/words.jsonl

A token is telling of a domain where the project's own sentences that hold it are about the domain (75% at least, both
classes counted alike). Latents are ranked by the share of their activation that falls on telling tokens. Give the file
to `guard lab explain` as --latents."""

Saes = Annotated[Path, typer.Option(metavar="FOLDER", help="What `guard lab train` wrote.")]
Texts = Annotated[Path, typer.Option(metavar="FOLDER", help="What `guard lab harvest --labelled` wrote.")]
Activations = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="What `guard lab harvest --corpus` wrote; needed the first time."),
]


def register(app: typer.Typer) -> None:
    app.command(epilog=_CONTRAST_EPILOG)(contrast)
    app.command(epilog=_COMPARE_EPILOG)(compare)
    app.command(epilog=_CANDIDATES_EPILOG)(candidates)
    app.command(epilog=_WORDS_EPILOG)(words)


def contrast(
    saes: Saes,
    texts: Texts,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where figures (JSON) and the curve (PNG) go.")],
    activations: Activations = None,
    by: Annotated[
        str,
        typer.Option(metavar="METRIC", help="Ranks the SAEs: p_best, i_cdf, i_cdf_net, l0_0.2 (L0>0.2) ..."),
    ] = "p_best",
    detect: Annotated[
        bool, typer.Option("--detect", help="Also ask whether the metric predicts detection on unseen sources.")
    ] = False,
    latents: Annotated[int, typer.Option(metavar="N", min=1, help="With --detect: latents of each head.")] = 128,
) -> None:
    """Rank SAEs by how their latents tell a concept from its absence, over the project's own pairs of sentences."""
    from guard.cli import terminal
    from guard.cli.progress import Progress
    from guard.lab.search import stages

    with Progress("pool", "shards encoded") as progress:
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
        typer.echo(f"train these on: guard lab train --config {out / 'picked.toml'} --from {saes} --tokens N ...")
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


def compare(
    contrast: Annotated[
        list[Path], typer.Option(metavar="DIR", help="What `guard lab contrast --detect` wrote. May be repeated.")
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the figures go, as JSON.")] = None,
) -> None:
    """Say what a doubling of tokens, or of width, changed."""
    from guard.cli import terminal
    from guard.lab.search.compare import compare as run

    found = run(contrast)
    terminal.out().print(comparison_table(found))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(found.model_dump_json(indent=1))
        typer.echo(f"{out}: {len(found.doublings)} pairs of SAEs")


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
            progress=progress.update,
        )
    terminal.out().print(counts_table(summary))
    terminal.out().print(precision_table(summary))
    if not summary.tokens_known:
        typer.echo("surface forms by token: not known, the shards of the texts hold no token ids")
    typer.echo(f"{out}: {sum(1 for _ in out.open(encoding='utf-8')):,} candidates of {len(summary.saes)} SAEs")


def words(
    saes: Saes,
    texts: Texts,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the latents go, as JSON lines.")],
    per_domain: Annotated[int, typer.Option(metavar="N", min=1, help="Latents of each domain.")] = 300,
    besides: Annotated[
        Path | None, typer.Option(metavar="PATH", help="But for the latents that this file of `lab fit` names.")
    ] = None,
) -> None:
    """Find the latents that answer to a domain's own words, whatever the text around them is about."""
    from guard.cli.progress import Progress
    from guard.lab.explain.explain import read_lines
    from guard.lab.search import stages

    known = {(line.sae, line.latent) for line in read_lines(besides, saes)} if besides else set()
    with Progress("words", "shards") as progress:
        count = stages.words(
            saes=saes, texts=texts, out=out, per_domain=per_domain, besides=known, progress=progress.update
        )
    typer.echo(f"{out}: {count:,} latents")
