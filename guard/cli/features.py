"""`guard features`: what each latent of the pack stands for. Needs the pack's files only, or a running sidecar."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from guard.cli import options
from guard.cli.options import UsageError
from guard.records import Feature, LatentId

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


class _ListByDefault(TyperGroup):
    """`guard features --domain terror` is `guard features list --domain terror`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {*self.commands, *ctx.help_option_names}
        return super().parse_args(ctx, args if args and args[0] in known else ["list", *args])


app = typer.Typer(cls=_ListByDefault, help="What the pack's latents stand for.", rich_markup_mode=None)

_LIST_EPILOG = """\b
Examples:
  guard features --domain violence --limit 20
  guard features list --search weapon --hook-point model.layers.14
  guard features --json --limit 0 > features.json"""

_SHOW_EPILOG = """\b
Examples:
  guard features show model.layers.22/4056
  guard features show model.layers.22/4056 --json"""


@app.command("list", epilog=_LIST_EPILOG)
def list_(
    domain: Annotated[str, typer.Option(metavar="D", help="Only this domain.")] = "",
    subdomain: Annotated[str, typer.Option(metavar="D", help="Only this sub-domain.")] = "",
    hook_point: Annotated[str, typer.Option(metavar="H", help="Only this hook point.")] = "",
    search: Annotated[
        str, typer.Option(metavar="WORDS", help="Only those whose name, domains or tokens hold this.")
    ] = "",
    limit: Annotated[int, typer.Option(metavar="N", min=0, help="At most N; 0 shows all.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
    address: options.Address = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCertificate = None,
    tls_key: options.TlsKey = None,
    pack: options.PackFolder = None,
    config: options.ConfigFile = None,
    set_: options.Set = None,
) -> None:
    """List the pack's features as a table."""
    sidecar = options.sidecar(address, pack, config, set_, tls_ca, tls_cert, tls_key)
    settings = options.settings(config, set_, pack)
    from guard.cli import terminal
    from guard.pack import catalogue

    filters = {"domain": domain, "subdomain": subdomain, "hook_point": hook_point}
    if sidecar:
        with sidecar.connect() as client:
            found = list(client.features(**filters))
    else:
        from guard.pack.loader import load_pack

        found = catalogue.features(load_pack(settings.pack), **filters)
    if search:
        found = catalogue.search(found, search)
    shown = found[:limit] if limit else found
    if as_json:
        typer.echo(terminal.json_line([_as_json(feature) for feature in shown]))
        return
    terminal.out().print(table(shown))
    if len(shown) < len(found):
        typer.echo(f"{len(shown)} of {len(found)}; --limit 0 shows all", err=True)


@app.command(epilog=_SHOW_EPILOG)
def show(
    latent: Annotated[str, typer.Argument(metavar="HOOK_POINT/INDEX", help="As the list shows it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    address: options.Address = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCertificate = None,
    tls_key: options.TlsKey = None,
    pack: options.PackFolder = None,
    config: options.ConfigFile = None,
    set_: options.Set = None,
) -> None:
    """Show one feature with examples and head weights."""
    sidecar = options.sidecar(address, pack, config, set_, tls_ca, tls_cert, tls_key)
    wanted = parse_latent(latent)
    settings = options.settings(config, set_, pack)
    from guard.cli import terminal

    if sidecar:
        with sidecar.connect() as client:
            feature = client.feature(wanted)
    else:
        from guard.pack import catalogue
        from guard.pack.loader import load_pack

        feature = catalogue.feature(load_pack(settings.pack), wanted)
    if as_json:
        typer.echo(terminal.json_line(_as_json(feature)))
    else:
        terminal.out().print(card(feature))


def parse_latent(given: str) -> LatentId:
    hook_point, _, index = given.rpartition("/")
    if not hook_point or not (index.isascii() and index.isdigit()) or int(index) >= 1 << 32:
        raise UsageError(f"found {given!r}, expected HOOK_POINT/INDEX, such as model.layers.22/4056")
    return LatentId(hook_point, int(index))


def _as_json(feature: Feature) -> dict[str, Any]:
    from guard.service.convert import feature_to_proto, message_to_json

    return message_to_json(feature_to_proto(feature))


def table(features: Sequence[Feature]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from guard.cli.terminal import visible

    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    result.add_column("latent", no_wrap=True)
    result.add_column("domains", overflow="fold")
    result.add_column("name", overflow="fold", ratio=1)
    result.add_column("r", justify="right")  # how well the explanation tells where it fires
    result.add_column("rate", justify="right")
    result.add_column("top weight", no_wrap=True)
    for f in features:
        head, weight = max(f.head_weights.items(), key=lambda item: abs(item[1]), default=("", 0.0))
        result.add_row(
            Text(visible(str(f.latent))),
            Text(visible(", ".join([*f.domains, *f.subdomains]))),
            Text(visible(f.name) or "(no name)"),
            "" if f.explanation_score is None else f"{f.explanation_score:.2f}",
            f"{f.firing_rate:.3%}",
            Text(f"{weight:+.2f} {visible(head)}" if head else ""),
        )
    return result


def card(f: Feature) -> "RenderableType":
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from guard.cli.terminal import visible

    facts = Table.grid(padding=(0, 2))
    rows = {
        "name": f.name or "(no name)",
        "explanation": f.explanation or "(none yet)",
        "domains": ", ".join(f.domains) or "(none)",
        "sub-domains": ", ".join(f.subdomains) or "(none)",
        "fires on": f"{f.firing_rate:.4%} of tokens, where its pre-activation is above {f.threshold:.4g}",
        "scale": f"{f.scale:.4g}",
        "scores": ", ".join(f"{name} {value:.3f}" for name, value in f.scores.items()) or "(none yet)",
        "top tokens": " ".join(f"“{token}”" for token in f.top_tokens) or "(none)",
    }
    for name, value in rows.items():
        facts.add_row(Text(name, "dim"), Text(visible(value)))
    weights = Table.grid(padding=(0, 2))
    most = max(map(abs, f.head_weights.values()), default=0.0)
    for head, weight in sorted(f.head_weights.items(), key=lambda item: -abs(item[1])):
        length = round(20 * abs(weight) / most) if most else 0
        colour = "red" if weight > 0 else "blue"
        weights.add_row(Text(f"  {visible(head)}"), Text(f"{weight:+.3f}", colour), Text("█" * length, colour))
    examples = []
    for e in f.examples:
        text = Text(f"  {e.activation:5.2f}  ", "dim")
        text.append(visible(e.text[: e.start]), "not dim")
        text.append(visible(e.text[e.start : e.end]), "not dim bold white on red")
        text.append(visible(e.text[e.end :]), "not dim")
        examples.append(text)
    parts: list[RenderableType] = [Text(visible(str(f.latent)), "bold"), facts]
    if f.head_weights:
        parts += [Text("weight in each head", "dim"), weights]
    if examples:
        parts += [Text("examples (peak activation, in units of its scale)", "dim"), *examples]
    return Group(*parts)
