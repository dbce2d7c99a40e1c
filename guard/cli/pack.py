"""`guard pack`: detector data, checked and shown."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guard.cli import exits, options

if TYPE_CHECKING:
    from guard.config import GuardConfig
    from guard.pack.loader import Pack

app = typer.Typer(help="Packs: versioned detector data for one model.", no_args_is_help=True, rich_markup_mode=None)

_Path = Annotated[Path | None, typer.Argument(metavar="PATH", help="The pack's folder. Default: the setting `pack`.")]

_CHECK_EPILOG = """\b
Examples:
  guard pack check detectors/smollm2-135m-instruct/safety-residual
  guard pack check ./my-pack --no-replay

Exit status: 0 the pack is good, 1 it is not, 2 usage error."""

_SHOW_EPILOG = """\b
Examples:
  guard pack show
  guard pack show ./my-pack --json"""


@app.command(epilog=_CHECK_EPILOG)
def check(
    path: _Path = None,
    replay: Annotated[bool, typer.Option(help="Judge the pack's own cases, which runs the model.")] = True,
    config: options.ConfigFile = None,
    set_: options.Set = None,
) -> None:
    """Check a pack: its files, its model, its own cases.

    Loads it, checks every file, verifies the model that it was made for, and replays its cases.
    """
    settings = options.settings(config, set_, path)
    from guard.pack.loader import check_model, load_pack
    from guard.reader import weights

    pack = load_pack(settings.pack)
    typer.echo(
        f"ok    files: {len(pack.latents)} latents at {len(pack.hook_points)} hook points, hash {pack.hash[:12]}"
    )
    from guard.cli.weights import report

    fingerprint = weights.fingerprint(weights.resolve(settings.reader.model, report=report))
    model = check_model(pack, fingerprint, settings.reader.allow_unverified)
    verified = "ok  " if model.verified else "warn"
    typer.echo(
        f"{verified}  model: {settings.reader.model}, weights {model.fingerprint[:12]}"
        f"{'' if model.verified else ', not the one that the pack was made for'}"
    )
    if not replay:
        typer.echo("skip  cases: --no-replay")
        return
    raise typer.Exit(_replay(pack, settings))


def _replay(pack: "Pack", settings: "GuardConfig") -> int:
    from guard.cli import backend
    from guard.cli.progress import Progress
    from guard.cli.terminal import visible
    from guard.pack import cases
    from guard.records import Action, CheckInput, CheckOptions

    with backend.opened(settings, None) as answers, Progress("replay", "cases", len(pack.cases)) as progress:
        done = 0

        def act(text: str) -> dict[str, Action]:
            nonlocal done
            verdict = answers.check(CheckInput(prompt=text), CheckOptions(max_attributions=0))
            done += 1
            progress.update(done)
            return {d.domain: d.action for p in verdict.phases for d in p.domains}

        results = cases.replay(pack.cases, act)
    failed = [result for result in results if not result.passed and result.case.known == "pass"]
    missed = [result for result in results if not result.passed and result.case.known == "miss"]
    for result in failed:
        case = result.case
        wanted = "flag or block" if case.expect == "act" else "allow"
        typer.echo(f"FAIL  {visible(case.id)}: {case.domain}: found {result.action.value}, expected {wanted}")
        typer.echo(f"      {visible(' '.join(case.text.split()))}")
    passed = len(results) - len(failed) - len(missed)
    known = f", {len(missed)} known misses" if missed else ""
    typer.echo(f"{'FAIL' if failed else 'ok  '}  cases: {passed} of {len(results)} pass{known}")
    return exits.ERROR if failed else exits.ALLOW


@app.command(epilog=_SHOW_EPILOG)
def show(
    path: _Path = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest and the evaluation as JSON.")] = False,
    config: options.ConfigFile = None,
    set_: options.Set = None,
) -> None:
    """Show what a pack holds and what it was made from."""
    settings = options.settings(config, set_, path)
    from guard.cli import terminal
    from guard.pack.loader import load_pack

    pack = load_pack(settings.pack)
    if as_json:
        manifest: dict[str, Any] = pack.manifest.model_dump(mode="json")
        typer.echo(terminal.json_line({"hash": pack.hash, "manifest": manifest, "evaluation": pack.evaluation}))
        return
    for part in _parts(pack):
        terminal.out().print(part)


def _parts(pack: "Pack") -> "list[Any]":
    from rich.text import Text

    from guard.cli.terminal import visible

    manifest = pack.manifest
    facts = {
        "folder": pack.folder,
        "hash": pack.hash,
        "model": f"{manifest.model.name}, weights {manifest.model.weights[:12]}, {manifest.model.dtype}",
        "scores": "calibrated probabilities" if manifest.calibrated else "an activation index, not probabilities",
        "latents": f"{len(pack.latents)}, {sum(bool(line.explanation) for line in pack.latents)} explained",
        "cases": len(pack.cases),
    }
    points = [
        (
            p.name,
            p.latents,
            p.probes,
            f"{p.sae_width}, k {p.sae_k:g}",
            f"{p.fvu:.3f}",
            f"{p.l0:.1f}",
            f"{p.dead_share:.1%}",
        )
        for p in manifest.hook_points
    ]
    heads = [(h.domain, h.head.value, _or_none(h.flag_at), _or_none(h.block_at)) for h in manifest.heads]
    sources = [(s.name, s.licence, s.use) for s in manifest.sources]
    return [
        Text(visible(f"{manifest.id} {manifest.version}"), "bold"),
        Text(visible(manifest.description)),
        _table((), list(facts.items())),
        _table(("hook point", "latents", "probes", "SAE", "FVU", "L0", "dead"), points),
        _table(("domain", "head", "flag at", "block at"), heads),
        _table(("made from", "licence", "use"), sources),
    ]


def _or_none(value: float | None) -> str:
    return "never" if value is None else f"{value:.3f}"


def _table(headings: tuple[str, ...], rows: "list[tuple[Any, ...]]") -> Any:
    from rich.table import Table
    from rich.text import Text

    from guard.cli.terminal import visible

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_header=bool(headings))
    for heading in headings or ("", ""):
        table.add_column(heading, overflow="fold", style="" if headings else None)
    for row in rows:
        table.add_row(*(Text(visible(str(cell))) for cell in row))
    return table
