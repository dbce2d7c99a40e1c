"""`guard watch`: a completion judged chunk by chunk as it comes out of another program."""

import codecs
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from guard.cli import exits, inputs, options
from guard.errors import InvalidInput
from guard.records import Action, Phase, Verdict

if TYPE_CHECKING:
    from rich.text import Text

_EPILOG = f"""\b
Examples:
  my-model --stream 'Tell me a story' | guard watch --prompt 'Tell me a story'
  guard watch --chunk-chars 20 < completion.txt
  guard watch --json --address 127.0.0.1:50051 < completion.txt

The last word of a chunk is held until the next chunk settles how it is read; the last line judges everything.

{exits.HELP} The status is that of the severest verdict of the stream, not of its last."""


def register(app: typer.Typer) -> None:
    app.command(epilog=_EPILOG)(watch)


def watch(
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What the completion answers.")] = None,
    chunk_chars: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Judge after every N characters. Default: after every line.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON verdict a line.")] = False,
    domain: options.Domain = None,
    attributions: options.Attributions = 5,
    address: options.Address = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCertificate = None,
    tls_key: options.TlsKey = None,
    pack: options.PackFolder = None,
    config: options.ConfigFile = None,
    set_: options.Set = None,
) -> None:
    """Judge a completion from stdin as it streams.

    Prints the running scores after each chunk.
    """
    sidecar = options.sidecar(address, pack, config, set_, tls_ca, tls_cert, tls_key)
    settings = options.settings(config, set_, pack)
    wanted = options.check_options(domain, attributions, tokens=False)
    from guard.cli import backend
    from guard.service.outcome import Outcome

    outcome = Outcome()
    with backend.opened(settings, sidecar) as answers:
        stream = answers.open_stream(wanted)

        def judge(phase: Phase, chunk: str | None, *, last: bool = False) -> Action:
            verdict = stream.feed(phase, chunk or "", last=last)
            _show(verdict, phase, chunk, as_json=as_json)
            return outcome.add(verdict).action

        try:
            if prompt is not None:
                judge(Phase.PROMPT, prompt, last=True)
            for chunk in chunks(inputs.stdin(), chunk_chars):
                judge(Phase.COMPLETION, chunk)
            action = judge(Phase.COMPLETION, None, last=True)
        finally:
            stream.close()
    raise typer.Exit(exits.of(action))


def chunks(stream: BinaryIO, size: int | None) -> Iterator[str]:
    """Lines, or pieces of `size` characters, as soon as they are there. Raises InvalidInput at the first bad byte."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, read = "", 0
    while True:
        raw = stream.readline() if size is None else stream.read1(max(size, 1))  # type: ignore[attr-defined]
        try:
            held += decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            bad = error.object[error.start]
            at = read + len(raw) - len(error.object) + error.start
            message = f"stdin is not valid UTF-8: byte 0x{bad:02x} at offset {at}"
            raise InvalidInput(message, reason="INVALID_UNICODE") from None
        read += len(raw)
        while held and (size is None or len(held) >= size or not raw):
            yield held[:size]
            held = held[len(held[:size]) :]
        if not raw:
            return


def _show(verdict: Verdict, phase: Phase, chunk: str | None, *, as_json: bool) -> None:
    if as_json:
        from guard.cli.terminal import json_line
        from guard.service.convert import verdict_to_json

        print(json_line(verdict_to_json(verdict)), flush=True)
        return
    from guard.cli import terminal

    terminal.out().print(running_line(verdict, phase, chunk), soft_wrap=True)
    sys.stdout.flush()


def running_line(verdict: Verdict, phase: Phase, chunk: str | None) -> "Text":
    """One line a chunk: action, a short bar for the head that says most about each domain, and how the chunk begins."""
    from rich.text import Text

    from guard.cli import render, terminal

    line = Text()
    line.append(f"{verdict.action.value.replace('_', ' ').upper():<12}", render.STYLES[verdict.action])
    said = next((p for p in verdict.phases if p.phase is phase), None)
    for domain in said.domains if said else ():
        top = render.leading([domain])
        if top is None:
            continue
        style = render.STYLES[domain.action] if domain.action is not Action.ALLOW else ""
        line.append(f"  {terminal.visible(domain.domain)} ")
        line.append_text(render.bar(top.head.score, top.head.flag_at, top.head.block_at, width=10))
        line.append(f" {top.head.score:.2f}", style)
    if said is None or not said.domains:
        line.append("  ".join(missing.reason.value for missing in verdict.not_assessed), "magenta")
    if chunk is None:
        line.append("  (end)", "dim")
    else:
        begin = " ".join(chunk.split())
        line.append(f"  {'prompt ' if phase is Phase.PROMPT else ''}", "dim")
        line.append(terminal.visible(begin if len(begin) <= 40 else begin[:39] + "…"), "italic dim")
    return line
