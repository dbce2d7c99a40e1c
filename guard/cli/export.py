"""`guard export`: a reader that needs no torch."""

import random
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guard.cli import options

if TYPE_CHECKING:
    from guard.pack.loader import Pack
    from guard.reader.export import Source

_EPILOG = """\b
Examples:
  guard export ./reader
  guard export ./reader-int8 --dtype int8
  guard serve --set reader.model=./reader-int8

The folder holds the model as deep as the pack's deepest hook point, its tokenizer, and a manifest with the \
fingerprints of what it was made from. Name it as the setting reader.model: torch is then neither needed nor loaded. \
int8 needs a processor with VNNI. Exporting needs pip install 'sae-guard[export]'."""


class Dtype(StrEnum):
    """What the matrix products are taken in."""

    FLOAT32 = "float32"
    INT8 = "int8"


def register(app: typer.Typer) -> None:
    app.command(epilog=_EPILOG)(export)


def export(
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="The new folder.")],
    dtype: Annotated[Dtype, typer.Option("--dtype", help="What products are taken in.")] = Dtype.FLOAT32,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="A model's name or folder. Default: the setting reader.model."),
    ] = None,
    pack: options.PackFolder = None,
    config: options.ConfigFile = None,
    set_: options.Set = None,
) -> None:
    """Write the reader as an ONNX folder that is read without torch."""
    settings = options.settings(config, set_, pack)
    from guard.cli.weights import report
    from guard.pack.loader import check_model, load_pack
    from guard.reader import weights
    from guard.reader.export import export as write

    loaded = load_pack(settings.pack)
    folder = weights.resolve(model or settings.reader.model, report=report)
    check_model(loaded, weights.fingerprint(folder), settings.reader.allow_unverified)
    told = write(folder, source(loaded), target, dtype.value, report=report)
    size = sum((target / name).stat().st_size for name in told.files) / 1e6
    typer.echo(f"folder     {target} ({size:.0f} MB)")
    typer.echo(f"dtype      {told.dtype}, {told.depth} layers")
    for name, digest in told.fingerprint.items():
        typer.echo(f"{name:<10} {digest}")


def source(pack: "Pack") -> "Source":
    """What a pack is exported with. Its texts: the cases, then examples of latents, shuffled the same way each time."""
    from guard.reader.export import Source

    cases = [case.text for case in pack.cases]
    examples = sorted({example.text for latent in pack.latents for example in latent.examples} - set(cases))
    random.Random(0).shuffle(examples)
    return Source(
        pack=f"{pack.manifest.id} {pack.manifest.version}",
        hook_points=[point.name for point in pack.hook_points],
        texts=[*cases, *examples],
    )
