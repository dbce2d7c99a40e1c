"""`guard config`: what is in force, and what each setting means."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from guard.cli import options

app = typer.Typer(help="Settings.", no_args_is_help=True, rich_markup_mode=None)

_NEVER = '"never"'

_EPILOG = """\b
Examples:
  guard config show
  guard config show --config guard.toml --set server.metrics=
  guard config show --toml > guard.toml

Defaults come first, then the file of --config, then GUARD_* environment variables (GUARD_READER__DTYPE=bfloat16), \
then flags. An empty variable counts as unset; GUARD_SERVER__METRICS= alone means off."""


@app.command(epilog=_EPILOG)
def show(
    toml: Annotated[bool, typer.Option("--toml", help="As TOML, which --config reads back.")] = False,
    pack: options.PackFolder = None,
    config: options.ConfigFile = None,
    set_: options.Set = None,
) -> None:
    """Show every setting in force, and what it means."""
    settings = options.settings(config, set_, pack)
    if toml:
        typer.echo(as_toml(settings), nl=False)
        return
    from rich.table import Table
    from rich.text import Text

    from guard.cli import terminal

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("setting", "value", "meaning"):
        table.add_column(heading, overflow="fold")
    for key, value, description in _walk(settings):
        table.add_row(Text(key), Text(terminal.visible(_literal(value) or "(none)"), "bold"), Text(description))
    terminal.out().print(table)


def as_toml(settings: BaseModel) -> str:
    """The settings as a TOML file with each description as a comment; `load_config` reads the same settings back."""
    lines: list[str] = []
    section = ""
    for key, value, description in _walk(settings):
        parent, _, name = key.rpartition(".")
        if parent != section:
            section = parent
            lines += ["", f"[{section}]"]
        lines.append(f"# {description}" if description else "")
        literal = _literal(value)
        lines.append(f"{name} = {literal}" if literal else f"# {name} =")
    return "\n".join(line for i, line in enumerate(lines) if line or i) + "\n"


def _walk(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, description) of every setting; plain settings before sections, as TOML needs it."""
    fields = type(model).model_fields
    for name in sorted(fields, key=lambda name: isinstance(getattr(model, name), BaseModel)):
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _walk(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, fields[name].description or ""


def _literal(value: Any) -> str:
    """`value` in TOML, which has no null: empty for None, but for a threshold (`guard.config.PolicyConfig`)."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        pairs = (f"{json.dumps(key)} = {_literal(part) or _NEVER}" for key, part in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    return f"[{', '.join(_literal(part) for part in value)}]"
