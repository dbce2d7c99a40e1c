"""`guard lab`: the stages by which a pack is made. Each reads and writes files, and can be run again alone."""

from pathlib import Path
from typing import Annotated

import typer

from guard.cli import lab_stages
from guard.cli.options import UsageError

app = typer.Typer(help="Make packs.", no_args_is_help=True, rich_markup_mode=None)

_HARVEST_EPILOG = """\b
Examples:
  guard lab harvest --corpus corpus/ --hook-point model.layers.9 --hook-point model.layers.18 \\
      --tokens 5000000 --out runs/activations
  guard lab harvest --labelled labelled/ --hook-point model.layers.9 --hook-point model.layers.18 --out runs/texts

--labelled reads *.jsonl, one {id, text, lang, source, label_domains, scope, kind} per line, and with them the
project's own sentences.
A run that was stopped goes on where it was when it is started again with the same options."""

_TRAIN_EPILOG = """\b
Examples:
  guard lab train --activations runs/activations --out runs/saes
  guard lab train --activations runs/activations --hook-point model.layers.9 --width 8192 --k 32 --out runs/wide

A run that was stopped goes on from its last checkpoint."""


@app.callback()
def _group() -> None:
    """Make packs: harvest -> train -> contrast -> fit -> evaluate -> build."""


@app.command(epilog=_HARVEST_EPILOG)
def harvest(
    given: typer.Context,
    hook_point: Annotated[
        list[str], typer.Option("--hook-point", metavar="H", help="A module, such as model.layers.14. May be repeated.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the activations go.")],
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            "--corpus", metavar="PATH", help="A text file (.txt, .txt.gz) or a folder of them. May be repeated."
        ),
    ] = None,
    labelled: Annotated[
        Path | None, typer.Option(metavar="DIR", help="In place of --corpus: a folder of labelled texts (*.jsonl).")
    ] = None,
    cap: Annotated[int, typer.Option(metavar="N", min=1, help="With --labelled: texts of one file, at most.")] = 3000,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to read, about.")] = 5_000_000,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A model's name, or a Hugging Face folder.")
    ] = "smollm2-135m-instruct",
    context: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of one piece of text, at most.")] = 256,
    shard_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of one file, about.")] = 32_768,
    dtype: Annotated[str, typer.Option(metavar="D", help="float32, bfloat16 or auto.")] = "auto",
    seed: Annotated[int, typer.Option(metavar="N", help="Chooses and shuffles the texts.")] = 0,
) -> None:
    """Write the activations of a corpus, or of labelled texts, to disk, reading them once."""
    one_source(given, corpus, labelled)
    files = corpus_files(corpus or [])
    from guard.cli.progress import Progress

    with Progress("harvest", "tokens") as progress:
        if labelled:
            from guard.lab import stages

            made = stages.harvest_labelled(
                model=model,
                folder=labelled,
                hook_points=hook_point,
                out=out,
                cap=cap,
                seed=seed,
                dtype=dtype,
                progress=progress.update,
            )
        else:
            from guard.lab.harvest import harvest as run

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


lab_stages.register(app)


def one_source(given: typer.Context, corpus: list[Path] | None, labelled: Path | None) -> None:
    """Raises UsageError unless there is a corpus or labelled texts, and only options that go with it."""
    if corpus and labelled:
        raise UsageError("--corpus and --labelled exclude each other: give one")
    if not corpus and not labelled:
        raise UsageError("found nothing to harvest: give --corpus or --labelled")
    useless = ("tokens", "context", "shard_tokens") if labelled else ("cap",)
    for name in useless:
        source = given.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect with {'--labelled' if labelled else '--corpus'}"
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
