"""`guard serve`: the sidecar."""

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, TextIO, cast

import typer

from guard.cli import options

if TYPE_CHECKING:
    from guard.service.addresses import Addresses

_EPILOG = """\b
Examples:
  guard serve
  guard serve --listen unix:/run/guard.sock --metrics 0.0.0.0:9464
  guard serve --listen 127.0.0.1:0 --set reader.dtype=bfloat16 --config guard.toml

Port 0 takes a free port; what is listened on is printed when health answers SERVING. SIGTERM and Ctrl-C drain and \
stop."""

GRPC = "gRPC listens on"
METRICS = "metrics on"
TAPS = "taps connect to"


def register(app: typer.Typer) -> None:
    app.command(epilog=_EPILOG)(serve)


def serve(
    listen: Annotated[
        list[str] | None,
        typer.Option("--listen", metavar="HOST:PORT|unix:/PATH", help="Where gRPC listens. May be repeated."),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option("--metrics", metavar="HOST:PORT", help="Where /metrics listens; '' turns it off.")
    ] = None,
    taps: Annotated[
        str | None,
        typer.Option("--taps", metavar="unix:/PATH|HOST:PORT", help="Where taps of served models connect."),
    ] = None,
    pack: options.PackFolder = None,
    config: options.ConfigFile = None,
    set_: options.Set = None,
) -> None:
    """Serve gRPC, health and Prometheus metrics.

    The API is guard.v1.GuardService; reflection is on. Ends in order on a signal.
    """
    settings = options.settings(config, set_, pack, listen=listen or None, metrics=metrics, taps=taps)
    import structlog

    from guard.cli.weights import report
    from guard.service import server

    # stdout is what `_say` says.
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(cast(TextIO, _Unfailing(sys.stderr))))
    server.run(settings, report=report, ready=_say)


class _Unfailing:
    """Where the log goes. A log that nobody reads any more, or a full disk, is no reason to fail a call."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


def _say(bound: "Addresses") -> None:
    for address in bound.grpc:
        print(f"{GRPC} {address}")
    if bound.taps:
        print(f"{TAPS} {bound.taps}")
    print(f"{METRICS} http://{bound.metrics}/metrics" if bound.metrics else f"{METRICS} no address (server.metrics)")
    print("serving; Ctrl-C stops", flush=True)
