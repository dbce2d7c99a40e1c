"""`guard lab`: the stages by which a pack is made. Each reads and writes files, and can be run again alone."""

from pathlib import Path
from typing import Annotated

import typer

from guard.cli.options import UsageError

app = typer.Typer(help="Make packs.", no_args_is_help=True, rich_markup_mode=None)

_HARVEST_EPILOG = """\b
Examples:
  guard lab harvest --corpus corpus/ --hook-point model.layers.9 --hook-point model.layers.18 \\
      --tokens 5000000 --out runs/activations

A run that was stopped goes on where it was when it is started again with the same options."""

_TRAIN_EPILOG = """\b
Examples:
  guard lab train --activations runs/activations --out runs/saes
  guard lab train --activations runs/activations --hook-point model.layers.9 --width 8192 --k 32 --out runs/wide

A run that was stopped goes on from its last checkpoint."""


@app.callback()
def _group() -> None:
    """Make packs: harvest activations, train SAEs, and on to a pack."""


@app.command(epilog=_HARVEST_EPILOG)
def harvest(
    corpus: Annotated[
        list[Path],
        typer.Option(
            "--corpus", metavar="PATH", help="A text file (.txt, .txt.gz) or a folder of them. May be repeated."
        ),
    ],
    hook_point: Annotated[
        list[str], typer.Option("--hook-point", metavar="H", help="A module, such as model.layers.14. May be repeated.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the activations go.")],
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to read, about.")] = 5_000_000,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A model's name, or a Hugging Face folder.")
    ] = "smollm2-135m-instruct",
    context: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of one piece of text, at most.")] = 256,
    shard_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of one file, about.")] = 32_768,
    dtype: Annotated[str, typer.Option(metavar="D", help="float32, bfloat16 or auto.")] = "auto",
    seed: Annotated[int, typer.Option(metavar="N", help="Chooses and shuffles the texts.")] = 0,
) -> None:
    """Write a corpus's activations to disk, reading it once."""
    files = corpus_files(corpus)
    from guard.cli.progress import Progress
    from guard.lab.harvest import harvest as run

    with Progress("harvest", "tokens") as progress:
        made = run(
            model=model,
            corpus=files,
            hook_points=hook_point,
            out=out,
            tokens=tokens,
            context=context,
            shard_tokens=shard_tokens,
            dtype=dtype,
            seed=seed,
            progress=progress.update,
        )
    typer.echo(f"{out}: {made.tokens:,} tokens in {made.shard_count} shards, d_model {made.d_model}, {made.dtype}")


@app.command(epilog=_TRAIN_EPILOG)
def train(
    activations: Annotated[Path, typer.Option(metavar="FOLDER", help="What `guard lab harvest` wrote.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the SAEs go, a folder for each hook point.")],
    hook_point: Annotated[
        list[str] | None,
        typer.Option("--hook-point", metavar="H", help="May be repeated. Default: all that were harvested."),
    ] = None,
    width: Annotated[int, typer.Option(metavar="N", min=1, help="Latents of each SAE.")] = 4608,
    k: Annotated[int, typer.Option(metavar="N", min=1, help="Latents that fire on a token, on average.")] = 40,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to train on.")] = 5_000_000,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of one step.")] = 2048,
    learning_rate: Annotated[float, typer.Option(metavar="X", min=0.0, help="At its highest.")] = 1e-3,
    held_out_shards: Annotated[int, typer.Option(metavar="N", min=1, help="Last shards, kept to measure on.")] = 2,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the weights and the order.")] = 0,
) -> None:
    """Train a BatchTopK SAE for each hook point.

    All side by side, over one stream of activations.
    """
    from guard.cli.progress import Progress
    from guard.lab import shards
    from guard.lab.train import TrainConfig
    from guard.lab.train import train as run

    config = TrainConfig(
        hook_points=tuple(hook_point or shards.described(activations).hook_points),
        width=width,
        k=k,
        tokens=tokens,
        batch=batch,
        learning_rate=learning_rate,
        held_out_shards=held_out_shards,
        seed=seed,
    )
    with Progress("train", "tokens") as progress:

        def update(done: int, total: int, fvu: dict[str, float]) -> None:
            progress.update(done, total, "FVU " + " ".join(f"{value:.3f}" for value in fvu.values()))

        reports = run(config, activations, out, update)
    for made in reports:
        typer.echo(
            f"{out / made.hook_point}: FVU {made.fvu:.4f}, L0 {made.l0:.1f}, dead {made.dead_share:.1%}, "
            f"width {made.width}, {made.tokens_trained:,} tokens"
        )


def corpus_files(given: list[Path]) -> list[Path]:
    """The text files among `given`, folders opened. Raises UsageError where there is none."""
    files: list[Path] = []
    for path in given:
        if path.is_dir():
            found = sorted(f for f in path.iterdir() if f.name.endswith((".txt", ".txt.gz")))
            if not found:
                raise UsageError(f"--corpus {path}: found no .txt or .txt.gz file in this folder")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UsageError(f"--corpus {path}: found no such file or folder")
    return files
