"""The command `guard`. Light at import: torch, transformers and grpc are imported by the commands that need them."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TextIO

import typer

from guard.cli import check, config, demo, exits, export, features, lab, pack, serve, tap, watch, weights
from guard.cli.terminal import visible
from guard.errors import GuardError, PackError

app = typer.Typer(
    name="guard",
    help="Says how risky a text is in each domain, and which features of a language model say so.",
    epilog="\b\nStart here:\n  guard demo\n  guard check 'some text'\n  guard serve\n\n" + exits.HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help keeps examples as they are written, and square brackets as brackets
    context_settings={"help_option_names": ["-h", "--help"]},
)
check.register(app)
watch.register(app)
serve.register(app)
demo.register(app)
export.register(app)
app.add_typer(features.app, name="features")
app.add_typer(pack.app, name="pack")
app.add_typer(weights.app, name="weights")
app.add_typer(config.app, name="config")
app.add_typer(tap.app, name="tap")
app.add_typer(lab.app, name="lab")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"guard {version('sae-guard')}")
        except PackageNotFoundError:
            typer.echo("guard (run from source, not installed)")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `guard` and returns its exit status; every error on purpose becomes one line on stderr."""
    _open_streams()
    debug = os.environ.get("GUARD_DEBUG", "") not in ("", "0")
    if not debug:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what grpc logs about an error, our own line says
    try:
        status = app(args=arguments, prog_name="guard", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else exits.ALLOW
    except typer.TyperException as error:
        _usage(error, sys.stderr)
        return error.exit_code
    except typer.Abort:
        return exits.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`guard check --file F | head`). Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.ERROR
    except Exception as error:
        if debug:
            raise
        print(f"guard: error: {_one_line(error)}", file=sys.stderr)
        return exits.ERROR


def _open_streams() -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: nobody reads it, and print would turn to the other one
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode gets "?" in place of a bar, not an error


def _usage(error: typer.TyperException, stream: TextIO) -> None:
    message = error.format_message()
    if "\n" in message:  # a group without a command: the message is its help
        print(message, file=stream)
        return
    context = getattr(error, "ctx", None)
    hint = f" (see '{context.command_path} --help')" if context is not None else ""
    print(f"guard: error: {visible(message)}{hint}", file=stream)


def _one_line(error: Exception) -> str:
    if isinstance(error, GuardError):
        message = str(error) + _hint(error)
    elif isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("guard"):
        message = f"this command needs the package {error.name!r}, which is not installed"
    elif isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        message = f"internal error, {type(error).__name__}: {error} (GUARD_DEBUG=1 shows where)"
    return visible(" ".join(message.split()))


def _hint(error: GuardError) -> str:
    """What to do where the shipped pack was not installed along with Guard."""
    from guard.config import DEFAULT_PACK

    absent = isinstance(error, PackError) and f"{DEFAULT_PACK}/manifest.toml: found no such file" in str(error)
    return "; name a pack's folder with --pack, or with the setting pack" if absent else ""


if __name__ == "__main__":
    sys.exit(main())
