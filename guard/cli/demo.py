"""`guard demo`: a sidecar of its own, a handful of prompts through gRPC, and what came back."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import IO, Annotated

import typer

from guard.cli import options, serve
from guard.errors import Unavailable
from guard.records import CheckInput, CheckOptions

_EPILOG = """\b
Examples:
  guard demo
  guard demo --once
  guard demo --pack ./my-pack

The first run fetches the model's weights (93 MB)."""

STOP_SECONDS = 15.0
_POLL_SECONDS = 0.2
READY_SECONDS = 120.0


def register(app: typer.Typer) -> None:
    app.command(epilog=_EPILOG)(demo)


def demo(
    once: Annotated[
        bool, typer.Option("--once", help="End after the prompts, instead of serving until Ctrl-C.")
    ] = False,
    pack: options.PackFolder = None,
    config: options.ConfigFile = None,
    set_: options.Set = None,
) -> None:
    """Start a sidecar on free ports and send it a few prompts."""
    settings = options.settings(config, set_, pack)
    if settings.server.tls_certificate is not None:
        raise options.UsageError(
            f"the demo speaks to its sidecar without TLS: found server.tls_certificate = "
            f"{settings.server.tls_certificate}, expected none"
        )
    flags = [f for value, name in ((pack, "--pack"), (config, "--config")) if value for f in (name, str(value))]
    flags += [flag for given in set_ or [] for flag in ("--set", given)]
    prompts = _prompts()
    from guard.cli.weights import report
    from guard.reader import weights

    weights.resolve(settings.reader.model, report=report)  # here, so that a download shows its progress
    with _sidecar(flags) as (process, address, metrics):
        _show(prompts, address)
        print(f"\ngRPC listens on {address}, metrics on {metrics}")
        print(f"  curl -s {metrics} | grep ^guard_")
        guard = "guard" if shutil.which("guard") else Path(sys.executable).with_name("guard")
        print(f"  {guard} check --address {address} 'your own text'", flush=True)
        if not once:
            _wait(process)


def _prompts() -> list[dict[str, str]]:
    lines = resources.files("guard.lab").joinpath("data/demo.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in lines.splitlines()]


def _show(prompts: list[dict[str, str]], address: str) -> None:
    from guard.cli import render, terminal
    from guard.service.client import GuardClient

    console = terminal.out()
    with GuardClient(address) as client:
        for prompt in prompts:
            wanted = CheckOptions(token_detail=True, max_attributions=4, request_id=prompt["id"])
            verdict = client.check(prompt["text"], options=wanted)
            console.rule(style="dim")
            console.print(render.verdict(verdict, CheckInput(prompt=prompt["text"])))
    console.rule(style="dim")


@contextmanager
def _sidecar(flags: list[str]) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A `guard serve` of our own: (process, gRPC address, URL of the metrics). It ends with this block."""
    from guard.cli import terminal

    command = [sys.executable, "-m", "guard.cli.main", "serve", *flags]
    command += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints, _signals_raise():
        # A session of its own: Ctrl-C reaches this process only, which then ends the sidecar in order.
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            start_new_session=True,
            preexec_fn=_die_with_us,  # noqa: PLW1509 - no thread of ours runs yet
        )
        try:
            with terminal.err().status("starting the sidecar: loading the model"):
                address, metrics = _listening(process, complaints)
                _await_serving(address)
            yield process, address, metrics
        finally:
            _end(process)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind like Ctrl-C, so that the sidecar is ended on the way out."""

    def unwind(number: int, _frame: FrameType | None) -> None:
        raise typer.Exit(128 + number)

    before = {number: signal.signal(number, unwind) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _die_with_us() -> None:
    """In the child: Linux sends it SIGTERM should we be killed without a chance to do so."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def _listening(process: "subprocess.Popen[str]", complaints: IO[str]) -> tuple[str, str]:
    """Reads what the sidecar prints when it listens. Raises Unavailable with its own words where it ended instead."""
    address = metrics = ""
    for line in process.stdout or ():
        if line.startswith(serve.GRPC):
            address = line.removeprefix(serve.GRPC).strip()
        elif line.startswith(serve.METRICS):
            metrics = line.removeprefix(serve.METRICS).strip()
        if address and metrics:
            return address, metrics
    status = process.wait()
    complaints.seek(0)
    said = [line.strip().removeprefix("guard: error: ") for line in complaints if line.strip()]
    raise Unavailable(f"the sidecar ended with status {status}: {said[-1] if said else '(it said nothing)'}")


def _await_serving(address: str) -> None:
    """Waits for the standard health service to answer SERVING. Raises Unavailable after READY_SECONDS."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from guard.service import connection

    ends = time.monotonic() + READY_SECONDS
    with grpc.insecure_channel(address, options=connection.OF_CHANNEL) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < ends:
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)
            except grpc.RpcError:
                continue
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            time.sleep(0.1)
    raise Unavailable(f"the sidecar at {address} did not answer SERVING within {READY_SECONDS:.0f} s")


def _wait(process: "subprocess.Popen[str]") -> None:
    """Until Ctrl-C, which is how a demo ends. Raises Unavailable where the sidecar ends first."""
    # Noted, not raised: what a handler raises while Python clears something away (gRPC's channel) is lost.
    got: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _frame: got.append(number)) for number in numbers}
    try:
        print("serving until Ctrl-C", flush=True)
        # In steps: a signal that comes just before a wait without end would be answered only after it.
        while not got and (status := process.poll()) is None:
            time.sleep(_POLL_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not got:
        raise Unavailable(f"the sidecar ended by itself with status {status}")
    if got[0] != signal.SIGINT:
        raise typer.Exit(128 + got[0])
    print("\nstopping", flush=True)


def _end(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except BaseException as error:  # a second Ctrl-C too
            process.kill()
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
    if process.stdout:
        process.stdout.close()
