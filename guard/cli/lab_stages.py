"""`guard lab fit | evaluate | build`: from trained SAEs and labelled texts to a pack."""

from pathlib import Path
from typing import Annotated

import typer

from guard.cli import lab_search
from guard.cli.lab_tables import figures_table
from guard.cli.options import UsageError

_FIT_EPILOG = """\b
Examples:
  guard lab fit --saes runs/saes --activations runs/activations --texts runs/texts --out runs/heads
  guard lab fit --saes runs/saes --activations runs/activations --texts runs/texts --out runs/sparse \\
      --latents-per-head 64 --latents-by-weight 0 --latent-c 0.01 --per-domain pornography=64,0,0.01
  guard lab fit --saes runs/saes --activations runs/activations --texts runs/texts --texts runs/chats --out runs/both
  guard lab fit --saes runs/saes --activations runs/activations --texts runs/texts --out runs/permissive \\
      --explained runs/explained --scores runs/segment --scores runs/judged --permissive --manifests data/

--explained keeps heads to latents whose explanation scores --least-score in what `guard lab simulate` wrote at the
segment level. --permissive fits and calibrates on sources alone whose licence passes nothing on (MIT, Apache-2.0, CC0,
CC BY) and on the project's own sentences; the other sources are only judged on."""

_REOPEN_EPILOG = """\b
Examples:
  guard lab reopen detectors/smollm2-135m-instruct/safety-residual --out runs/saes
  H="--hook-point model.layers.0 --hook-point model.layers.7 --hook-point model.layers.14 --hook-point model.layers.22"
  guard lab harvest --labelled labelled/ $H --out runs/texts
  guard lab fit --saes runs/saes --texts runs/texts --explained runs/saes --scores runs/saes --out runs/heads \\
      --latents-per-head 2000 --latents-by-weight 0 --latents-by-contrast 0 --latent-c 5e-4 \\
      --per-domain pornography=2000,0,5e-4 --prior-tokens 8 --passage-tokens 64 --passage-caution 0.2
  guard lab evaluate --saes runs/saes --texts runs/texts --fitted runs/heads
  guard lab build --saes runs/saes --texts runs/texts --fitted runs/heads --out my-packs/safety

So a pack's heads are fitted to labelled texts of your own. Latents that the pack does not hold are silent, and
decoders are absent: it does for heads, not for other stages."""

_NARROW_EPILOG = """\b
Examples:
  guard lab fit --saes runs/saes --activations runs/activations --texts runs/texts --only-choose --out runs/pool
  guard lab narrow --saes runs/saes --latents runs/pool/latents.jsonl --out runs/kept
  guard lab narrow --saes runs/saes --explained runs/explained --scores runs/segment --in-domains --out runs/kept

With --explained, those whose explanation scores --least-score are kept, and what was said of them comes along. Give the
folder to fit, evaluate, build and join as --saes. Decoders are left out: explain before, or with the whole suite."""

_JOIN_EPILOG = """\b
Examples:
  guard lab reopen detectors/smollm2-135m-instruct/safety-residual --out runs/reopened
  guard lab join --saes runs/reopened --saes runs/kept --out runs/joined

A suite's folder may be whole or narrowed. Of each hook point the latents of the second suite are numbered behind those
of the first."""

_EVALUATE_EPILOG = """\b
Examples:
  guard lab evaluate --saes runs/saes --texts runs/texts --fitted runs/heads

Prints AUROC on sources that the fit had not seen; every figure goes to evaluation.json in the --fitted folder."""

_BUILD_EPILOG = """\b
Examples:
  guard lab build --saes runs/saes --texts runs/texts --fitted runs/heads --manifests data/ --out my-packs/safety

The pack takes its name from the last part of --out. Then: guard pack check my-packs/safety"""

Saes = Annotated[Path, typer.Option(metavar="FOLDER", help="What `guard lab train` wrote.")]
Texts = Annotated[
    list[Path],
    typer.Option(
        metavar="FOLDER",
        help="What `guard lab harvest --labelled` wrote. May be repeated: bare texts first; those in chats calibrate.",
    ),
]
Manifests = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Holds manifest_*.json with the sources' licences.")
]
Fitted = Annotated[Path, typer.Option(metavar="FOLDER", help="What `guard lab fit` wrote.")]


def register(app: typer.Typer) -> None:
    lab_search.register(app)
    app.command(epilog=_REOPEN_EPILOG)(reopen)
    app.command(epilog=_NARROW_EPILOG)(narrow)
    app.command(epilog=_JOIN_EPILOG)(join)
    app.command(epilog=_FIT_EPILOG)(fit)
    app.command(epilog=_EVALUATE_EPILOG)(evaluate)
    app.command(epilog=_BUILD_EPILOG)(build)


def reopen(
    pack: Annotated[Path, typer.Argument(metavar="PACK", help="A pack's folder.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where its SAEs and explanations go.")],
) -> None:
    """Lay a pack out as the stages left it, so that its heads can be fitted to other texts."""
    from guard.lab.explain.reopen import reopen as stage

    count = stage(pack, out)
    typer.echo(f"{out}: {count:,} latents; give it to `guard lab fit` as --saes, --explained and --scores")


def narrow(
    saes: Saes,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where their rows go.")],
    latents: Annotated[
        Path | None, typer.Option(metavar="PATH", help="These alone; what `lab fit` or `lab candidates` wrote.")
    ] = None,
    explained: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="What `guard lab explain` wrote: those whose explanation held."),
    ] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="What `guard lab simulate` and `judge` wrote. May be repeated."),
    ] = None,
    least_score: Annotated[float, typer.Option(min=-1.0, max=1.0, help="Of an explanation that held.")] = 0.2,
    in_domains: Annotated[bool, typer.Option("--in-domains", help="Of them those that belong to a domain.")] = False,
) -> None:
    """Keep a suite's rows of some latents alone: a few MB, which do for heads and packs."""
    from guard.lab.explain.explain import read_lines
    from guard.lab.suite.narrow import carry, held
    from guard.lab.suite.narrow import narrow as stage

    runs = scores or []
    if latents is None and explained is None:
        raise UsageError("found neither --latents nor --explained, expected one at least")
    if (explained is None) == bool(runs) or (in_domains and explained is None):
        raise UsageError("--explained and --scores go together, and --in-domains with them")
    named = None if latents is None else {(line.sae, line.latent) for line in read_lines(latents, saes)}
    sure = None if explained is None else held(explained, runs, least_score, in_domains=in_domains)
    kept = set.intersection(*(latents for latents in (named, sure) if latents is not None))
    stage(saes, kept, out)
    if explained is not None:
        carry(explained, runs, kept, out)
    typer.echo(f"{out}: {len(kept):,} latents of {len({sae for sae, _ in kept})} SAEs")


def join(
    saes: Annotated[
        list[Path],
        typer.Option(metavar="FOLDER", help="A suite, with its explanations and scores if it has them. Repeat it."),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the joined SAEs go.")],
) -> None:
    """Lay suites side by side, as if each hook point had one SAE: for packs that draw on several."""
    from guard.lab.suite.join import join as stage

    typer.echo(f"{out}: {stage(saes, out):,} latents; give it to `guard lab fit` as --saes, --explained and --scores")


def fit(
    saes: Saes,
    texts: Texts,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the fit goes.")],
    activations: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="What `guard lab harvest --corpus` wrote; needed the first time."),
    ] = None,
    latents_per_head: Annotated[
        int, typer.Option(metavar="N", min=0, help="Latents chosen for a head by its labelled texts.")
    ] = 128,
    latents_by_weight: Annotated[
        int, typer.Option(metavar="N", min=0, help="Latents chosen for a head by their weight in a fit over many.")
    ] = 200,
    latents_by_contrast: Annotated[
        int, typer.Option(metavar="N", min=0, help="Latents chosen for a domain by its contrast pairs.")
    ] = 32,
    latents_by_purity: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Latents chosen for a domain that fire in its texts and in few others."),
    ] = 0,
    latent_c: Annotated[
        float, typer.Option(metavar="X", min=0.0, help="How freely latents are weighted; less holds back more.")
    ] = 2e-4,
    per_domain: Annotated[
        list[str],
        typer.Option(
            metavar="D=N,W,C",
            help="The two before and --latent-c for one domain; given once, these defaults are gone. May be repeated.",
        ),
    ] = ["pornography=0,300,1e-3", "politics=0,300,1e-3", "terror=300,400,1e-3"],  # noqa: B006 - typer takes its defaults from here, and never changes them
    dense_c: Annotated[float, typer.Option(metavar="X", min=0.0, help="The same for the dense probe.")] = 0.001,
    exponent: Annotated[
        float, typer.Option(metavar="X", min=0.0, max=1.0, help="Sums are divided by tokens to this power.")
    ] = 0.5,
    power: Annotated[
        float,
        typer.Option(metavar="X", min=0.01, max=1.0, help="Then raised to it: under 1, a few firings count more."),
    ] = 0.5,
    prior_tokens: Annotated[
        float,
        typer.Option(
            metavar="N", min=0.0, help="Tokens that tell nothing, added to each text's: a few are little evidence."
        ),
    ] = 0.0,
    passage_tokens: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Longer texts are scored passage by passage too, of N tokens each; 0: as wholes."
        ),
    ] = 0,
    passage_caution: Annotated[
        float,
        typer.Option(
            metavar="X", min=0.0, help="Each of n passages is held back by X ln(n): one of many looks severe by chance."
        ),
    ] = 0.0,
    iterations: Annotated[int, typer.Option(metavar="N", min=1, help="Steps of the solver, at most.")] = 100,
    explained: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="What `guard lab explain` wrote: keep to its latents.")
    ] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="With --explained: what tested the explanations. May be repeated."),
    ] = None,
    least_score: Annotated[
        float, typer.Option(metavar="R", min=-1.0, max=1.0, help="With --explained: drop what scores less.")
    ] = 0.2,
    permissive: Annotated[
        bool, typer.Option("--permissive", help="Fit on permissively licensed sources alone; needs --manifests.")
    ] = False,
    manifests: Manifests = None,
    only_choose: Annotated[
        bool, typer.Option("--only-choose", help="Write latents.jsonl, which `guard lab explain` takes, and no more.")
    ] = False,
) -> None:
    """Choose latents and fit heads, without each group of sources in turn."""
    from guard.cli.progress import Progress
    from guard.lab import stages
    from guard.lab.explain.gather import gather
    from guard.lab.heads.fit import FitConfig

    config = FitConfig(
        latents_per_head=latents_per_head,
        latents_by_weight=latents_by_weight,
        latents_by_contrast=latents_by_contrast,
        latents_by_purity=latents_by_purity,
        latent_c=latent_c,
        per_domain=tuple(per_domain),
        dense_c=dense_c,
        exponent=exponent,
        power=power,
        prior_tokens=prior_tokens,
        passage_tokens=passage_tokens,
        passage_caution=passage_caution,
        iterations=iterations,
        sources=_permissive(texts, manifests) if permissive else (),
        least_score=least_score,
    )
    if passage_tokens % 2:
        raise UsageError(f"--passage-tokens: found {passage_tokens}, expected an even number: passages overlap by half")
    if bool(explained) != bool(scores):
        raise UsageError("--explained and --scores go together: give both or neither")
    kept, dropped = gather(explained, scores, least_score) if explained and scores else ([], 0)
    with Progress("fit", "groups of sources") as progress:
        count = stages.fit(
            saes=saes,
            activations=activations,
            texts=texts,
            out=out,
            config=config,
            explained=kept,
            only_choose=only_choose,
            progress=progress.update,
        )
    typer.echo(f"{out / 'latents.jsonl'}: {count:,} latents that the heads keep")
    if kept:
        typer.echo(f"{len(kept):,} explained latents to choose among, {dropped:,} dropped (below {least_score:g})")
    if config.sources:
        typer.echo(f"fitted on own sentences and {', '.join(config.sources)}")
    if not only_choose:
        typer.echo(f"{out}: fitted; judge it with `guard lab evaluate`")


def evaluate(saes: Saes, texts: Texts, fitted: Fitted) -> None:
    """Judge the heads on sources that they were not fitted on, beside TF-IDF and a dense probe."""
    from guard.cli import terminal
    from guard.cli.progress import Progress
    from guard.lab import stages
    from guard.lab.heads.evaluate import standings

    with Progress("evaluate", "groups of sources") as progress:
        found = stages.evaluate(saes=saes, texts=texts, fitted=fitted, progress=progress.update)
    terminal.out().print(figures_table(found))
    for standing in standings(found):
        behind = standing.behind_beyond_chance
        typer.echo(
            f"combined against {standing.baseline}: ahead or level in {standing.ahead} of {standing.judged} "
            f"(beyond chance in {standing.ahead_beyond_chance}); behind beyond chance in {len(behind)}"
            + (f": {', '.join(behind)}" if behind else "")
        )


def build(
    saes: Saes,
    texts: Texts,
    fitted: Fitted,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The pack's folder.")],
    manifests: Manifests = None,
    version: Annotated[
        str, typer.Option("--pack-version", metavar="V", help="The version that the pack bears.")
    ] = "0.1.0",
) -> None:
    """Fit the heads that ship, on every source that they may be fitted on, and write the pack."""
    from guard.cli.progress import Progress
    from guard.lab import stages

    with Progress("build", "texts read again") as progress:
        made = stages.build(
            saes=saes,
            texts=texts,
            fitted=fitted,
            manifests=manifests,
            version=version,
            out=out,
            progress=progress.update,
        )
    typer.echo(f"{out}: pack written, hash {made[:12]}")


def _permissive(texts: list[Path], manifests: Path | None) -> tuple[str, ...]:
    """The harvested sources whose licence is permissive. Raises UsageError where there is no word of licences."""
    from guard.lab import stages
    from guard.lab.labelled import permissive

    if manifests is None:
        raise UsageError("--permissive needs --manifests, which say how each source is licensed")
    licences = stages.licences(manifests)
    sources = sorted({row.source for folder in texts for row in stages.read_rows(folder)})
    found = tuple(name for name in sources if permissive(licences.get(name, "")))
    if not found:
        raise UsageError(f"--permissive: found no permissive licence in {manifests} for any source of {texts[0]}")
    return found
