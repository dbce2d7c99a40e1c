"""`guard lab simulate | judge`: whether explanations hold, on texts that their explainer has not seen."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guard.cli.lab_explain import AnnotatorOption, By, Chunk, annotator_of
from guard.cli.options import UsageError

if TYPE_CHECKING:
    from guard.lab.explain.judge import Judgement
    from guard.lab.explain.scores import Interval
    from guard.lab.explain.shared import Source
    from guard.lab.explain.simulate import Summary

_SIMULATE_EPILOG = """\b
Examples:
  guard lab simulate --explained runs/explained --level token --out runs/token
  guard lab simulate --explained runs/explained --level segment --against runs/token --out runs/segment
  guard lab simulate --explained runs/explained --together 8 --windows 2 --shared --saes runs/saes --texts runs/texts \\
      --against runs/token --out runs/shared
  guard lab simulate --explained runs/explained --level embedding --against runs/segment --out runs/cheap

Whoever knows the explanation alone says where the latent fires; the score is the correlation with truth, text in which
it is silent included. token: from 0 to 10, for every token. segment: fires or not, for every stretch of about
--segment-tokens tokens. embedding: asks nobody; how near a small model's readings of explanation and segment are.
Cheaper: fewer --windows, several latents --together, or with --shared, each of these tested on the texts of all.
Tasks are answered as those of `guard lab explain`. OUT/scores.jsonl has a line a latent, OUT/summary.json the rest."""

_JUDGE_EPILOG = """\b
Examples:
  guard lab judge --explained runs/explained --out runs/judged
  guard lab judge --explained runs/explained --annotator endpoint.toml --windows 6 --out runs/judged

Detection: balanced accuracy at telling texts in which a latent fires from as many hard negatives. Shuffled: the same
with another latent's explanation; tasks of both kinds look alike and are mixed."""

Explained = Annotated[Path, typer.Option(metavar="FOLDER", help="What `guard lab explain` wrote.")]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where tasks, scores and their summary go.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Chooses windows and their order.")]


def register(app: typer.Typer) -> None:
    app.command(epilog=_SIMULATE_EPILOG)(simulate)
    app.command(epilog=_JUDGE_EPILOG)(judge)


def simulate(
    given: typer.Context,
    explained: Explained,
    out: Out,
    level: Annotated[str, typer.Option(metavar="LEVEL", help="token, segment or embedding.")] = "segment",
    against: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Another run: tell how the scores agree and what was saved.")
    ] = None,
    segment_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of a segment, about.")] = 8,
    windows: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Of each latent, firing and silent each, at most. Default: all."),
    ] = None,
    together: Annotated[int, typer.Option(metavar="N", min=1, help="Latents in one prompt.")] = 1,
    shared: Annotated[
        bool, typer.Option("--shared", help="Test them on each other's texts too; needs --saes and --texts.")
    ] = False,
    saes: Annotated[Path | None, typer.Option(metavar="FOLDER", help="As given to `guard lab explain`.")] = None,
    texts: Annotated[Path | None, typer.Option(metavar="FOLDER", help="As given to `guard lab explain`.")] = None,
    corpus: Annotated[Path | None, typer.Option(metavar="FOLDER", help="As given to `guard lab explain`.")] = None,
    hook_point: Annotated[
        str, typer.Option(metavar="H", help="At the embedding level: where the small model is read.")
    ] = "model.layers.14",
    annotator: AnnotatorOption = "files",
    by: By = "not named",
    chunk: Chunk = 20,
    seed: Seed = 0,
) -> None:
    """Score explanations by how well they tell where a latent fires."""
    from guard.cli.progress import Progress
    from guard.lab.explain import cheap
    from guard.lab.explain import simulate as stage
    from guard.lab.explain.explain import made_from

    if level not in {"token", "segment", "embedding"}:
        raise UsageError(f"--level: found {level!r}, expected token, segment or embedding")
    _refuse_useless(given, level, shared=shared)
    if shared and together == 1:
        raise UsageError("--shared has no effect on one latent in a prompt: give --together")
    source = _source(explained, saes, texts, corpus) if shared else None
    config = stage.SimulateConfig.model_validate(
        {
            "level": level,
            "segment_tokens": segment_tokens,
            "windows": windows,
            "together": together,
            "shared": shared,
            "seed": seed,
            "model": made_from(explained).model,
            "hook_point": hook_point,
        }
    )
    if level == "embedding":
        with Progress("simulate", "texts") as progress:
            summary = cheap.simulate_cheaply(
                explained=explained, out=out, config=config, against=against, progress=progress.update
            )
    else:
        asked = annotator_of(annotator, out, evidence=explained, by=by, chunk=chunk)
        with Progress("simulate", "steps") as progress:
            summary = stage.simulate(
                explained=explained,
                out=out,
                config=config,
                annotator=asked,
                source=source,
                against=against,
                progress=progress.update,
            )
        typer.echo(asked.standing())
    _tell(out, summary)


def judge(
    explained: Explained,
    out: Out,
    windows: Annotated[
        int, typer.Option(metavar="N", min=1, help="Of each latent, firing and silent each, at most.")
    ] = 10,
    shuffled: Annotated[
        bool, typer.Option("--shuffled/--no-shuffled", help="Ask about other latents' explanations too, as a control.")
    ] = True,
    annotator: AnnotatorOption = "files",
    by: By = "not named",
    chunk: Chunk = 20,
    seed: Seed = 0,
) -> None:
    """Ask which of several alike texts an explanation fits, beside a control with explanations exchanged."""
    from guard.cli.progress import Progress
    from guard.lab.explain import judge as stage

    asked = annotator_of(annotator, out, evidence=explained, by=by, chunk=chunk)
    config = stage.JudgeConfig(windows=windows, shuffled=shuffled, seed=seed)
    with Progress("judge", "tasks") as progress:
        judgement = stage.judge(explained=explained, out=out, config=config, annotator=asked, progress=progress.update)
    typer.echo(asked.standing())
    _tell_judgement(out, judgement)


def _refuse_useless(given: typer.Context, level: str, *, shared: bool) -> None:
    """Raises UsageError for an option that the level, or the lack of --shared, leaves without effect."""
    useless = {
        "token": ("segment_tokens", "hook_point"),
        "segment": ("hook_point",),
        "embedding": ("together", "shared", "annotator", "by", "chunk"),
    }[level]
    for name in useless:
        _refuse(given, name, f"at --level {level}")
    if not shared:
        for name in ("saes", "texts", "corpus"):
            _refuse(given, name, "without --shared")


def _refuse(given: typer.Context, name: str, where: str) -> None:
    source = given.get_parameter_source(name)
    if source is not None and source.name == "COMMANDLINE":
        raise UsageError(f"--{name.replace('_', '-')} has no effect {where}")


def _source(explained: Path, saes: Path | None, texts: Path | None, corpus: Path | None) -> "Source":
    from guard.lab.explain.explain import made_from
    from guard.lab.explain.shared import Source

    if saes is None or texts is None:
        raise UsageError("--shared needs --saes and --texts, as given to `guard lab explain`")
    made = made_from(explained)
    if bool(made.corpus) != (corpus is not None):
        expected = "expected --corpus, as given" if made.corpus else "found --corpus, but none was given"
        raise UsageError(f"--shared: {expected} to `guard lab explain` for {explained}")
    return Source(saes, texts, corpus, made.corpus_shards)


def _tell(out: Path, summary: "Summary") -> None:
    medians = ", ".join(f"median {name} {value:.2f}" for name, value in summary.median.items())
    typer.echo(
        f"{out}: {summary.latents:,} latents scored ({summary.open:,} open, {summary.not_testable:,} not testable)"
        + (f", {medians}" if medians else "")
        + f", {summary.cost.tokens_per_latent:,.0f} tokens a latent"
    )
    for a in summary.agreement:
        rho = "too few latents, or all tied" if a.spearman is None else f"Spearman {_interval(a.spearman, a.interval)}"
        saved = "" if a.cost_cut is None else f", cost cut by {a.cost_cut:.0%}"
        typer.echo(f"{a.score} against {a.against} over {a.latents:,} latents: {rho}{saved}")


def _tell_judgement(out: Path, judgement: "Judgement") -> None:
    means = ", ".join(f"mean {name} {value:.2f}" for name, value in judgement.mean.items())
    typer.echo(
        f"{out}: {judgement.latents:,} latents judged ({judgement.open:,} tasks open, "
        f"{judgement.not_testable:,} latents not testable)"
        + (f", {means}" if means else "")
        + f", {judgement.cost.tokens_per_latent:,.0f} tokens a latent"
    )
    if judgement.lead is not None:
        typer.echo(f"ahead of shuffled explanations by {_interval(judgement.lead, judgement.lead_interval)}")


def _interval(value: float, interval: "Interval | None") -> str:
    return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
