"""`guard lab explain`: what each latent stands for, said by people or by a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from guard.lab.explain.annotator import Annotator

_EPILOG = """\b
Examples:
  guard lab explain --saes runs/saes --texts runs/texts --latents runs/candidates.jsonl --limit 200 --out runs/explained
  guard lab explain --saes runs/saes --texts runs/texts --corpus runs/corpus \\
      --latents detectors/smollm2-135m-instruct/safety-residual --annotator endpoint.toml --out runs/explained

By files: answer what stands in OUT/tasks/*.jsonl with lines {"id": ..., "prompt": ..., "answer": {...}} in
OUT/answers/*.jsonl, and run the same command again; as often as you like.
By an endpoint (OpenAI-compatible): its TOML file needs url, model and budget_tokens; it may set key_env, parallel,
per_minute, retries, timeout, answer_tokens, budget_money, price_sent, price_received (of a million tokens), parameters.
A run that was stopped goes on where it was when it is started again with the same options."""

AnnotatorOption = Annotated[
    str, typer.Option("--annotator", metavar="files|FILE", help="By files, or an endpoint's TOML file.")
]
By = Annotated[
    str, typer.Option("--by", metavar="NAME", help="By files: who answers, where an answer does not say it.")
]
Chunk = Annotated[int, typer.Option("--chunk", metavar="N", min=1, help="By files: tasks of one file.")]


def register(app: typer.Typer) -> None:
    app.command(epilog=_EPILOG)(explain)


def explain(
    saes: Annotated[Path, typer.Option(metavar="FOLDER", help="What `guard lab train` wrote.")],
    texts: Annotated[Path, typer.Option(metavar="FOLDER", help="What `guard lab harvest --labelled` wrote.")],
    latents: Annotated[Path, typer.Option(metavar="PATH", help="What `lab candidates` or `lab fit` wrote, or a pack.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where evidence, tasks and explanations go.")],
    corpus: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="What `guard lab harvest --corpus` wrote: more texts to show.")
    ] = None,
    corpus_shards: Annotated[int, typer.Option(metavar="N", min=1, help="Shards of it, spread evenly.")] = 32,
    name: Annotated[
        list[str] | None, typer.Option("--name", metavar="SAE", help="Its latents only. May be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="The N latents tagged most surely.")] = None,
    annotator: AnnotatorOption = "files",
    by: By = "not named",
    chunk: Chunk = 20,
    seed: Annotated[int, typer.Option(metavar="N", help="Chooses the texts that are shown.")] = 0,
) -> None:
    """Ask a person or a model what each latent stands for, showing where it fires and where it nearly does."""
    from guard.cli.progress import Progress
    from guard.lab.explain import explain as stage

    with Progress("evidence", "shards") as progress:
        evidence = stage.prepare(
            saes=saes,
            texts=texts,
            latents=latents,
            out=out,
            corpus=corpus,
            corpus_shards=corpus_shards,
            names=name or (),
            limit=limit,
            seed=seed,
            progress=progress.update,
        )
    asked = annotator_of(annotator, out, evidence=out, by=by, chunk=chunk)
    with Progress("explain", "tasks") as progress:
        made = stage.explain(evidence, asked, out, progress.update)
    typer.echo(asked.standing())
    typer.echo(
        f"{out / 'explanations.jsonl'}: {len(made.explanations):,} of {made.latents:,} latents explained "
        f"({made.silent:,} fire in no text), {made.tokens_sent + made.tokens_received:,} tokens"
    )


def annotator_of(given: str, out: Path, *, evidence: Path, by: str, chunk: int) -> "Annotator":
    """Who is asked, working in `out`; `evidence` is the folder of `guard lab explain`, which says what model reads."""
    if given != "files":
        from guard.lab.explain.chat import read_config
        from guard.lab.explain.endpoint import Endpoint

        return Endpoint(out, read_config(Path(given)))
    from guard.lab.explain.annotator import Files
    from guard.lab.explain.explain import made_from
    from guard.reader import weights
    from guard.reader.tokens import TextTokenizer

    tokenizer = TextTokenizer(weights.resolve(made_from(evidence).model))
    return Files(out, lambda text: len(tokenizer.text(text).ids), name=by, chunk=chunk)
