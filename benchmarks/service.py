"""What the service costs around the model: unary calls and streams, 1 to 64 callers, one core for the server.

The baseline is a bare grpc.aio server that answers with as many bytes. `canned` checks are whole ones (tokens, windows,
queue, pooling, heads, attributions, metrics, messages), only that the model and the encoder cost nothing.
"""

import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import uvloop

from benchmarks.figures import Report
from benchmarks.given import text_of
from benchmarks.hosted import METHODS, Hosted, hosting, other_cores
from guard.config import load_config
from guard.reader import weights
from guard.reader.tokens import TextTokenizer
from guard.service.pb.guard.v1 import guard_pb2 as pb

CALLERS = (1, 4, 16, 64)
SECONDS = 1.5  # of load, for each measurement
BARE = "bare echo"
RATE, TAIL = 3000.0, 3.0  # checks a second on one core; p99 over p50 of one caller


@dataclass
class Load:
    """What one round of one case came to; latencies in seconds."""

    calls: int = 0
    seconds: float = 0.0
    cpu: float = 0.0  # of the server
    latencies: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.calls / self.seconds

    def quantile(self, share: float) -> float:
        return sorted(self.latencies)[min(len(self.latencies) - 1, int(share * len(self.latencies)))]


def run(report: Report, pack: Path, repeats: int) -> None:
    ours = os.sched_getaffinity(0)
    tokenizer = TextTokenizer(weights.resolve(load_config().reader.model, report=lambda _: None))
    try:
        os.sched_setaffinity(0, other_cores())
        _plumbing(report, pack, tokenizer, max(2, repeats // 2))
        _whole(report, pack, tokenizer, max(2, repeats // 2))
    finally:
        os.sched_setaffinity(0, ours)


def _request(text: str, attributions: int) -> bytes:
    options = pb.CheckOptions(max_attributions=attributions)
    return pb.CheckRequest(text=text, request_id="0123456789abcdef", options=options).SerializeToString()


def _plumbing(report: Report, pack: Path, tokenizer: TextTokenizer, repeats: int) -> None:
    for tokens, attributions in ((16, 5), (16, 1), (16, 0), (128, 5)):
        request = _request(text_of(tokenizer, tokens), attributions)
        kind = f"{tokens} tokens, {attributions} attributions"
        with hosting("canned", str(pack)) as guarded:
            size = len(uvloop.run(_once(guarded, request)))
            with hosting("echo", str(size)) as bare:
                report.notes[f"bytes of an answer, {kind}"] = float(size)
                first = (tokens, attributions) == (16, 5)
                for callers in CALLERS if first else (16,):
                    hosts = {BARE: bare, "canned": guarded}
                    _compare(report, hosts, request, callers, repeats, kind, unary_load)
                if first:
                    chunk = _chunk(text_of(tokenizer, 16))
                    for callers in (1, 16):
                        _compare(report, hosts, chunk, callers, repeats, "a stream's chunk of 16 tokens", stream_load)


def _whole(report: Report, pack: Path, tokenizer: TextTokenizer, repeats: int) -> None:
    with hosting("reader", str(pack)) as guarded:
        for tokens in (16, 128):
            request = _request(text_of(tokenizer, tokens), 5)
            with hosting("echo", str(len(uvloop.run(_once(guarded, request))))) as bare:
                for callers in (1, 16):
                    hosts = {BARE: bare, "real reader": guarded}
                    _compare(report, hosts, request, callers, repeats, f"{tokens} tokens", unary_load)


def _chunk(text: str) -> bytes:
    return pb.WatchRequest(chunk=pb.WatchRequest.Chunk(phase=pb.PHASE_PROMPT, text=text + " ")).SerializeToString()


async def _once(host: Hosted, request: bytes) -> bytes:
    async with grpc.aio.insecure_channel(host.address) as channel:
        answer: bytes = await channel.unary_unary(METHODS["Check"])(request)
        return answer


def _compare(
    report: Report,
    hosts: dict[str, Hosted],
    request: bytes,
    callers: int,
    repeats: int,
    kind: str,
    load: "Callable[[Hosted, bytes, int, float], Awaitable[Load]]",
) -> None:
    """Both servers in turn, round by round."""
    rounds: dict[str, list[Load]] = {name: [] for name in hosts}
    for host in hosts.values():
        uvloop.run(load(host, request, callers, 0.3))
    for _ in range(repeats):
        for name, host in hosts.items():
            rounds[name].append(uvloop.run(load(host, request, callers, SECONDS)))
    baseline = (f"{BARE}, the same", [r.seconds / r.calls for r in rounds[BARE]])
    for name, told in rounds.items():
        what = f"{name}, {kind}, {callers} callers"
        report.add(what, [r.seconds / r.calls for r in told], baseline, unit="us a call", scale=1e6)
        rate, cpu = statistics.median(r.rate for r in told), statistics.median(r.cpu / r.calls for r in told)
        half, tail = (statistics.median(r.quantile(share) for r in told) for share in (0.5, 0.99))
        report.notes[what] = (
            f"{rate:,.0f} calls a second; {cpu * 1e6:,.0f} us of the server's CPU a call ({1 / cpu:,.0f} a second on "
            f"one core); p50 {half * 1e3:.2f} ms, p99 {tail * 1e3:.2f} ms, {tail / half:.1f} x"
        )


async def unary_load(host: Hosted, request: bytes, callers: int, seconds: float) -> Load:
    async with grpc.aio.insecure_channel(host.address) as channel:
        call = channel.unary_unary(METHODS["Check"])
        await call(request)

        async def ask(_: int) -> None:
            await call(request)

        return await _loaded(host, ask, callers, seconds)


async def stream_load(host: Hosted, request: bytes, callers: int, seconds: float) -> Load:
    """Each caller feeds chunk after chunk to a stream of its own."""
    async with grpc.aio.insecure_channel(host.address) as channel:
        streams: list[Any] = [channel.stream_stream(METHODS["Watch"])() for _ in range(callers)]

        async def ask(caller: int) -> None:
            await streams[caller].write(request)
            if await streams[caller].read() is grpc.aio.EOF:
                raise RuntimeError(f"the stream ended: {await streams[caller].details()}")

        load = await _loaded(host, ask, callers, seconds)
        for stream in streams:
            stream.cancel()
        return load


async def _loaded(host: Hosted, ask: Callable[[int], Awaitable[None]], callers: int, seconds: float) -> Load:
    load = Load()

    async def caller(number: int, ends: float) -> None:
        while (begun := time.perf_counter()) < ends:
            await ask(number)
            load.latencies.append(time.perf_counter() - begun)

    cpu, started = host.cpu_seconds(), time.perf_counter()
    await asyncio.gather(*(caller(number, started + seconds) for number in range(callers)))
    load.seconds, load.cpu = time.perf_counter() - started, host.cpu_seconds() - cpu
    load.calls = len(load.latencies)
    return load
