"""`guard check`: one text, one chat, or a file of thousands."""

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guard.cli import exits, inputs, options
from guard.cli.options import UsageError
from guard.records import Action, CheckInput, CheckOptions

if TYPE_CHECKING:
    from guard.cli.backend import Backend

_EPILOG = f"""\b
Examples:
  guard check 'How do I kill a Python process?'
  echo 'some text' | guard check --json
  guard check --chat messages.json --completion 'Sure, here is how'
  echo 'the prompt' | guard check - --completion 'Sure, here is how'
  guard check --file texts.jsonl --out verdicts.jsonl --domain violence
  guard check --address unix:/run/guard.sock 'some text'

{exits.HELP}

With --file: 0 when every row was assessed, whatever the actions; 12 when any row was not assessed (each such line \
says why, and the run goes on)."""


def register(app: typer.Typer) -> None:
    app.command(epilog=_EPILOG)(check)


def check(
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="TEXT",
            help="The prompt. `-` reads stdin (one line end at its end is dropped), and so does giving none of TEXT, "
            "--chat, --completion and --file.",
        ),
    ] = None,
    chat: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The prompt as a chat: a JSON list of {role, content}; `-` reads stdin."),
    ] = None,
    completion: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="A completion, read behind the prompt; alone where no prompt is given."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="F.jsonl",
            help="Check many: one {id, text} per line (other keys are ignored, blank lines skipped), one JSON verdict "
            "per line, in order. `-` reads stdin.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="F.jsonl", help="With --file: where the verdicts go.")] = None,
    as_json: options.Json = False,
    domain: options.Domain = None,
    attributions: options.Attributions = 5,
    tokens: Annotated[bool, typer.Option("--tokens", help="JSON: add what each token adds to each head.")] = False,
    address: options.Address = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCertificate = None,
    tls_key: options.TlsKey = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.001, help="With --address: wait no longer for an answer."),
    ] = None,
    pack: options.PackFolder = None,
    config: options.ConfigFile = None,
    set_: options.Set = None,
) -> None:
    """Judge one text, one chat, or a file of thousands.

    Says how risky it is in each domain, and which features and tokens say so.
    """
    sidecar = options.sidecar(address, pack, config, set_, tls_ca, tls_cert, tls_key, timeout)
    given = [name for name, value in (("TEXT", text), ("--chat", chat), ("--file", file)) if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other: give one")
    if file is not None and completion is not None:
        raise UsageError("--completion and --file exclude each other")
    if out is not None and file is None:
        raise UsageError("--out goes with --file only")
    asked = _asked(text, chat, completion) if file is None else CheckInput()
    if file is not None:
        _look_at(file, out)
    settings = options.settings(config, set_, pack)
    # People see the tokens coloured, which needs their detail; JSON carries it only when it is asked for.
    detail = tokens or (file is None and not as_json)
    wanted = options.check_options(domain, attributions, tokens=detail)
    from guard.cli import backend

    with backend.opened(settings, sidecar) as answers:
        if file is not None:
            status = _check_file(file, out, answers, wanted)
        else:
            status = _check_one(asked, answers, wanted, as_json=as_json)
    raise typer.Exit(status)


def _asked(text: str | None, chat: Path | None, completion: str | None) -> CheckInput:
    if chat is not None:
        return CheckInput(inputs.chat(chat), completion)
    if text is None and completion is not None:
        # Not read unasked: a script's stdin may be a pipe that never ends, or the lines that its loop goes through.
        if inputs.text_waits_on_stdin():
            typer.echo(
                "guard: judging the completion alone; `-` reads the prompt from stdin, which holds text", err=True
            )
        return CheckInput(None, completion)
    if text == "-" or (text is None and not inputs.at_terminal()):
        return CheckInput(inputs.stdin_text(), completion)
    if text is None:
        raise UsageError("found nothing to check: give TEXT, --chat, --completion or --file, or pipe text in")
    return CheckInput(text, completion)


def _check_one(asked: CheckInput, answers: "Backend", wanted: CheckOptions, *, as_json: bool) -> int:
    verdict = answers.check(asked, wanted)
    if as_json:
        from guard.cli.terminal import json_line
        from guard.service.convert import verdict_to_json

        typer.echo(json_line(verdict_to_json(verdict)))
    else:
        from guard.cli import render, terminal

        terminal.out().print(render.verdict(verdict, asked))
    return exits.of(verdict.action)


def _look_at(file: Path, out: Path | None) -> None:
    """Finds what is wrong with the files before a model is loaded. A named pipe can be opened only once."""
    stdin = str(file) == "-"
    if not stdin and not file.is_fifo():
        with file.open("rb"):
            pass
    if out is not None and out.is_file():
        with suppress(OSError):  # stdin may be no file at all
            read = os.fstat(inputs.stdin().fileno()) if stdin else file.stat()
            if os.path.samestat(read, out.stat()):
                raise UsageError(f"--out {out} is the file that --file reads: it would be overwritten")
    if out is not None and not out.is_fifo():
        with out.open("ab"):
            pass


def _check_file(file: Path, out: Path | None, answers: "Backend", wanted: CheckOptions) -> int:
    from guard.cli import rows, terminal
    from guard.cli.progress import Progress

    counts: dict[Action, int] = dict.fromkeys(Action, 0)
    unassessed = 0
    with ExitStack() as stack:
        stream = inputs.stdin() if str(file) == "-" else stack.enter_context(file.open("rb"))
        total = None if not file.is_file() else rows.count(file)
        sink = stack.enter_context(out.open("w", encoding="utf-8")) if out else None
        progress = stack.enter_context(Progress("check", "rows", total))
        for done, (row, verdict) in enumerate(rows.assess(rows.arriving(stream), answers, wanted), 1):
            print(terminal.json_line(rows.as_json(row, verdict), utf8=True if out else None), file=sink, flush=not out)
            counts[verdict.action] += 1
            unassessed += bool(verdict.not_assessed) or verdict.action is Action.NOT_ASSESSED
            progress.update(done, note=f"{unassessed} not assessed" if unassessed else "")
    told = ", ".join(f"{n} {action.value.replace('_', ' ')}" for action, n in counts.items() if n)
    typer.echo(f"check: {sum(counts.values())} rows: {told or 'nothing to check'}", err=True)
    return exits.NOT_ASSESSED if unassessed else exits.ALLOW
