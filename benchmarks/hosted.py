"""A server in a process of its own, pinned to one core: `python -m benchmarks.hosted KIND PACK` (`echo BYTES`).

| kind | what answers |
|---|---|
| `echo` | a bare grpc.aio server: bytes of the size that a verdict has, and nothing else |
| `canned` | Guard's own service, but the model and the encoder hand out what they once made of a text |
| `reader` | Guard's own service, whole |

The first line that it prints is its address. It ends when its standard input does.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import uvloop

from benchmarks.given import text_of
from guard.assessor import Assessor, Observer
from guard.assessor.pipeline import Pipeline, Unit
from guard.config import GuardConfig, load_config
from guard.kernels.contract import Encoded
from guard.service.server import serve, spare_the_collector

METHODS = {"Check": "/guard.v1.GuardService/Check", "Watch": "/guard.v1.GuardService/Watch"}
_CORES = os.sched_getaffinity(0)
_TICKS = os.sysconf("SC_CLK_TCK")


class Canned(Pipeline):
    """The real pipeline, but for the model and the encoder: what they once made of a text is handed out for ever."""

    def __init__(self, config: GuardConfig, *, report: Callable[[str], None]) -> None:
        super().__init__(config, report=report)
        tokens = config.reader.window - 1
        unit = Unit([self.tokenizer.sink_id, *self.tokenizer.text(text_of(self.tokenizer, tokens)).ids], skip=1)
        super().run([unit])
        # Of every length before a call comes: one that had to be made meanwhile would count as the service's.
        self._known = [tuple(_first(e, count) for e in unit.encoded) for count in range(tokens + 2)]

    def run(self, units: Sequence[Unit]) -> None:
        for unit in units:
            unit.encoded = self._known[len(unit.ids) - unit.skip]
            unit.seconds = {"read": 0.0, "encode": 0.0}
        self.observer.batch(len(units), sum(len(unit.ids) for unit in units), units[0].seconds)


def _first(encoded: Encoded, count: int) -> Encoded:
    kept = encoded.token < count
    return Encoded(encoded.token[kept], encoded.row[kept], encoded.value[kept], encoded.probe[:count], finite=True)


@dataclass(frozen=True)
class Hosted:
    address: str
    pid: int

    def cpu_seconds(self) -> float:
        """User and system time of all threads of the process so far."""
        told = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(told[11]) + int(told[12])) / _TICKS

    def resident_bytes(self) -> int:
        told = Path(f"/proc/{self.pid}/statm").read_text(encoding="utf-8").split()
        return int(told[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def hosting(kind: str, *arguments: str) -> Iterator[Hosted]:
    """Raises RuntimeError where the server ends before it listens; its own words are on standard error."""
    command = [sys.executable, "-m", "benchmarks.hosted", kind, *arguments]
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _first_core())  # before it starts: threads keep what they were born with
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    finally:
        os.sched_setaffinity(0, ours)
    with process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the server's pipes are missing")
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"benchmarks.hosted {kind}: ended before it listened")
        try:
            yield Hosted(address, process.pid)
        finally:
            process.stdin.close()


def _first_core() -> set[int]:
    return {min(_CORES)}


def other_cores() -> set[int]:
    """Those that no server is pinned to; the only one where there is one."""
    return _CORES - _first_core() or _CORES


async def _until_stdin_ends() -> None:
    await asyncio.to_thread(sys.stdin.read)


async def _echo(size: int) -> None:
    answer = bytes(size)

    async def unary(_request: bytes, _context: Any) -> bytes:
        return answer

    async def stream(requests: Any, context: Any) -> None:
        async for _ in requests:
            await context.write(answer)

    server = grpc.aio.server()
    handlers = {
        "Check": grpc.unary_unary_rpc_method_handler(unary),
        "Watch": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_registered_method_handlers("guard.v1.GuardService", handlers)
    _say(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    await _until_stdin_ends()
    await server.stop(0)


async def _guard(config: GuardConfig, assessor: Assessor) -> None:
    end = asyncio.Event()
    server = asyncio.create_task(serve(config, assessor, ready=lambda bound: _say(*bound.grpc), until=end))
    await asyncio.wait([server, asyncio.create_task(_until_stdin_ends())], return_when=asyncio.FIRST_COMPLETED)
    end.set()
    await server


def _say(address: str) -> None:
    sys.stdout.write(address + "\n")
    sys.stdout.flush()


def main(kind: str, *arguments: str) -> None:
    if kind == "echo":
        uvloop.run(_echo(int(arguments[0])))
        return
    config = load_config(
        overrides={
            "pack": arguments[0],
            "reader": {"threads": 1},
            "server": {"listen": ["127.0.0.1:0"], "metrics": "", "grace_seconds": 0},
            "sessions": {"limit": 1024},
        }
    )
    pipeline = (Canned if kind == "canned" else Pipeline)(config, report=lambda _: None)
    assessor = Assessor(config, pipeline, Observer())
    spare_the_collector()
    uvloop.run(_guard(config, assessor))


if __name__ == "__main__":
    main(*sys.argv[1:])
