"""`guard lab report`: a page on a suite and what was found in it."""

from pathlib import Path
from typing import Annotated

import typer

_EPILOG = """\b
Examples:
  guard lab report --saes runs/saes --texts runs/texts --candidates runs/candidates.jsonl --out runs/report
  guard lab report --saes runs/saes --texts runs/texts --candidates runs/candidates.jsonl \\
      --contrast runs/contrast --out runs/report

Writes index.html, which opens without a network, and data/*.json, what each plot was made from."""


def register(app: typer.Typer) -> None:
    app.command(epilog=_EPILOG)(report)


def report(
    saes: Annotated[Path, typer.Option(metavar="FOLDER", help="What `guard lab train` wrote.")],
    texts: Annotated[Path, typer.Option(metavar="FOLDER", help="What `guard lab harvest --labelled` wrote.")],
    candidates: Annotated[Path, typer.Option(metavar="FILE", help="What `guard lab candidates` wrote.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the page and its data go.")],
    contrast: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What `guard lab contrast` wrote, for the curve.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A model's name or folder. Default: the one that read the texts."),
    ] = None,
) -> None:
    """Draw a page: the suite, its features by layer and domain, entities, languages, a landscape."""
    from guard.cli.progress import Progress
    from guard.lab.report.page import make_report

    with Progress("report", "steps") as progress:
        page = make_report(
            saes=saes,
            texts=texts,
            candidates=candidates,
            out=out,
            contrast=contrast,
            model=model,
            progress=progress.update,
        )
    typer.echo(f"{page}: written; its data is in {out / 'data'}")
