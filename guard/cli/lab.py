"""`guard lab`: the stages by which a pack is made. Each reads and writes files, and can be run again alone."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from guard.cli import lab_explain, lab_report, lab_simulate, lab_stages
from guard.cli.options import UsageError

app = typer.Typer(help="Make packs.", no_args_is_help=True, rich_markup_mode=None)

_HARVEST_EPILOG = """\b
Examples:
  guard lab harvest --corpus corpus/ --hook-point model.layers.9 --hook-point model.layers.18 \\
      --tokens 5000000 --out runs/activations
  guard lab harvest --labelled labelled/ --hook-point model.layers.9 --hook-point model.layers.18 --out runs/texts
  guard lab harvest --labelled labelled/ --in-chats --hook-point model.layers.9 --hook-point model.layers.18 \\
      --out runs/chats
  guard lab harvest --annotated data/ --hook-point model.layers.9 --hook-point model.layers.18 --out runs/annotated

--labelled reads *.jsonl, one {id, text, lang, source, label_domains, scope, kind} per line, and with them the
project's own sentences. --annotated reads the texts that the project annotated (docs/annotating.md), which lie under
labelled/dev and corpus of the folder.
A run that was stopped goes on where it was when it is started again with the same options."""

_TRAIN_EPILOG = """\b
Examples:
  guard lab train --config search --activations runs/activations --out runs/suite
  guard lab train --config chosen.toml --from runs/suite --activations runs/more --out runs/chosen
  torchrun --nproc-per-node 4 --no-python \\
      guard lab train --config search --activations runs/activations --out runs/suite

Shipped suites: search (44 SAEs, to choose among), reference (for a stream of everything) and domain (for one that is
mostly about the four domains).
A run that was stopped goes on from its last checkpoint, also with another number of processes."""


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
    annotated: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="In place of either: the data folder whose texts the project annotated."),
    ] = None,
    cap: Annotated[int, typer.Option(metavar="N", min=1, help="With --labelled: texts of one file, at most.")] = 3000,
    in_chats: Annotated[
        bool,
        typer.Option("--in-chats", help="Read labelled or annotated texts as messages and answers in chats, not bare."),
    ] = False,
    share: Annotated[
        list[str] | None,
        typer.Option(
            "--share", metavar="FILE=WEIGHT", help="Take more, or less, of one file of --corpus. May be repeated."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="With --corpus: tokens to read, about.")] = 5_000_000,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="A model's name, or a Hugging Face folder.")
    ] = "smollm2-135m-instruct",
    context: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of one piece of text, at most.")] = 256,
    shard_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="With --corpus: tokens of a file, about.")
    ] = 32_768,
    dtype: Annotated[str, typer.Option(metavar="D", help="float32, bfloat16 or auto.")] = "auto",
    seed: Annotated[int, typer.Option(metavar="N", help="Chooses and shuffles the texts, and places in chats.")] = 0,
) -> None:
    """Write the activations of a corpus, or of labelled texts, to disk, reading them once."""
    one_source(given, {"corpus": corpus, "labelled": labelled, "annotated": annotated})
    weights = shares(share or [])
    files = corpus_files(corpus or [])
    from guard.cli.progress import Progress

    with Progress("harvest", "tokens") as progress:
        if texts := annotated or labelled:
            from guard.lab import stages
            from guard.lab.annotated import rows as annotated_rows
            from guard.lab.labelled import all_rows

            made = stages.harvest_labelled(
                model=model,
                rows=annotated_rows(texts) if annotated else all_rows(texts, cap=cap, seed=seed),
                hook_points=hook_point,
                out=out,
                seed=seed,
                in_chats=in_chats,
                context=context,
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
                shares=weights,
                progress=progress.update,
            )
    typer.echo(f"{out}: {made.tokens:,} tokens in {made.shard_count} shards, d_model {made.d_model}, {made.dtype}")


@app.command(epilog=_TRAIN_EPILOG)
def train(
    config: Annotated[str, typer.Option(metavar="FILE", help="The suite's TOML file, or the name of a shipped suite.")],
    activations: Annotated[Path, typer.Option(metavar="FOLDER", help="What `guard lab harvest` wrote.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the SAEs go, a folder for each.")],
    start_from: Annotated[
        str, typer.Option("--from", metavar="FOLDER", help="A finished suite: train its SAEs of these names on.")
    ] = "",
    tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens to train on, in place of the file's.")
    ] = None,
) -> None:
    """Train a suite of SAEs side by side, over one stream of activations."""
    from guard.cli.progress import Progress
    from guard.lab.suite.config import read_config
    from guard.lab.suite.ranks import joined
    from guard.lab.suite.recovered import add_recovered
    from guard.lab.suite.train import train as run

    suite = read_config(config)
    given = {"tokens": tokens or suite.tokens, "start_from": start_from or suite.start_from}
    suite = suite.model_copy(update=given)
    with joined() as ranks:
        # One process speaks for all: its own SAEs are a fair share of the suite.
        with Progress("train", "tokens") if ranks.first else nullcontext() as progress:

            def trained(done: int, total: int, fvu: dict[str, float]) -> None:
                if progress:
                    progress.update(done, total, f"mean FVU {sum(fvu.values()) / max(len(fvu), 1):.4f}")

            run(suite, activations, out, trained, ranks=ranks)
        with Progress("cross-entropy", "SAEs") if ranks.first else nullcontext() as progress:

            def judged(done: int, total: int) -> None:
                if progress:
                    progress.update(done, total)

            add_recovered(activations, out, suite.held_out_shards, judged, ranks=ranks)
        if ranks.first:
            show(out)


def show(out: Path) -> None:
    """A line for each SAE of the suite."""
    from guard.lab.suite.measure import read_reports

    for made in read_reports(out) or []:
        typer.echo(
            f"{out / made.name}: FVU {made.fvu:.4f}, L0 {made.l0:.1f}, dead {made.dead_share:.1%}, "
            + (f"CE recovered {made.ce.recovered:.1%}, " if made.ce else "")
            + f"{made.tokens_trained:,} tokens"
        )


lab_stages.register(app)
lab_explain.register(app)
lab_simulate.register(app)
lab_report.register(app)


_GOES_WITH = {
    "corpus": ("tokens", "context", "shard_tokens", "share"),
    "labelled": ("cap", "in_chats", "context"),
    "annotated": ("in_chats", "context"),
}


def one_source(given: typer.Context, sources: dict[str, object]) -> None:
    """Raises UsageError unless one of the sources of texts is there, and only options that go with it."""
    found = [name for name, source in sources.items() if source]
    if len(found) > 1:
        raise UsageError(f"--{found[0]} and --{found[1]} exclude each other: give one")
    if not found:
        raise UsageError("found nothing to harvest: give --corpus, --labelled or --annotated")
    for name in dict.fromkeys(option for options in _GOES_WITH.values() for option in options):
        source = given.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in _GOES_WITH[found[0]]:
            raise UsageError(f"--{name.replace('_', '-')} has no effect with --{found[0]}")


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


def shares(given: list[str]) -> dict[str, float]:
    """`FILE=WEIGHT` options as a mapping. Raises UsageError for one that does not read so."""
    result = {}
    for option in given:
        name, _, weight = option.rpartition("=")
        try:
            result[name] = float(weight)
        except ValueError:
            name = ""
        if not name:
            raise UsageError(f"--share: found {option!r}, expected FILE=WEIGHT, such as wiki.txt.gz=2")
    return result
