"""`guard tap`: taps of served models."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from guard.cli import exits, options
from guard.errors import InvalidInput

app = typer.Typer(help="Taps of served models.", no_args_is_help=True, rich_markup_mode=None)

_EPILOG = """\b
Examples:
  guard tap compare --file texts.jsonl
  guard tap compare --file texts.jsonl --dtype bfloat16 --limit 100 --json

--file holds one {id, text} per line. Each text is put to the model as a user's message. A flip is a text whose action
differs; the exit status is 0 whatever the figures are."""


@app.callback()
def _group() -> None:
    """Taps of served models."""


@app.command(epilog=_EPILOG)
def compare(
    file: Annotated[Path, typer.Option("--file", metavar="JSONL", help="The texts.")],
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype", metavar="D", help="Of the tapped model. May be repeated. Default: float32 and bfloat16."
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="Texts at most, the first ones.")] = 1000,
    pack: options.PackFolder = None,
    config: options.ConfigFile = None,
    set_: options.Set = None,
    json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each dtype.")] = False,
) -> int:
    """Score the same texts in reader mode and through a transformers tap, and say how far they lie apart."""
    dtypes = dtype or ["float32", "bfloat16"]
    for name in dtypes:
        if name not in {"float32", "bfloat16", "float16"}:
            raise options.UsageError(f"--dtype: found {name!r}, expected float32, bfloat16 or float16")
    settings = options.settings(config, set_, pack)
    texts = _texts(file, limit)
    from guard.assessor.fidelity import compare as measure
    from guard.assessor.pipeline import Pipeline
    from guard.cli.progress import Progress
    from guard.cli.weights import report

    with Progress("compare", "readings") as progress:
        found = measure(Pipeline(settings, report=report), settings, texts, dtypes, progress=progress.update)
    from guard.cli import terminal

    if json:
        for line in found:
            typer.echo(terminal.json_line(asdict(line)))
        return exits.ALLOW
    typer.echo(f"reader mode in {settings.reader.dtype}; {found[0].texts} texts, {found[0].tokens} tokens scored")
    typer.echo("tapped in  hits: Jaccard  score: mean  largest apart                flips")
    for line in found:
        largest = f"{line.score_max:.4f} {line.score_max_head}"
        typer.echo(f"{line.dtype:<10} {line.hits_jaccard:13.4f} {line.score_mean:12.5f}  {largest:<28} {line.flips:5}")
    for line in found:
        for flip in line.flipped:
            typer.echo(f"{line.dtype}: {flip}")
    return exits.ALLOW


def _texts(file: Path, limit: int) -> list[str]:
    """Raises InvalidInput naming the first line that holds no text, and for a file without any."""
    from guard.cli import rows

    texts: list[str] = []
    with file.open("rb") as stream:
        for row in rows.read(stream):
            if row.problem or not row.text.strip():
                raise InvalidInput(f"{file}:{row.line}: {row.problem or 'text: found only whitespace, expected text'}")
            texts.append(row.text)
            if len(texts) == limit:
                break
    if not texts:
        raise InvalidInput(f"{file}: found no texts, expected one {{id, text}} per line")
    return texts
