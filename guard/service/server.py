"""The gRPC server: listens, says how it is, drains and stops. Its process's signals have one owner: `serve`."""

import asyncio
import contextlib
import gc
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import structlog
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from guard.assessor import Assessor
from guard.config import GuardConfig
from guard.errors import ConfigError
from guard.service import connection
from guard.service.addresses import (
    Addresses,
    check_server,
    clear_stale_socket,
    credentials,
    split_host_port,
    unix_path,
    why_not,
)
from guard.service.health import TAPS, Health
from guard.service.metrics import Metrics
from guard.service.servicer import SERVICE, GuardServicer
from guard.service.taps import TapServicer
from guard.service.wire import SERVICE as TAP_SERVICE

READINESS = "readiness"
_TAPS = 64  # at once: each holds a thread for as long as it is connected

_log = structlog.get_logger("guard.service")


class Server:
    """One server around an assessor that somebody else owns. Must be used on one event loop."""

    def __init__(self, config: GuardConfig, assessor: Assessor) -> None:
        self._config, self._assessor = config, assessor
        self.metrics = Metrics(assessor)
        self._observer_before = assessor.observer
        self._servicer = GuardServicer(assessor, self.metrics)
        self._health = Health(SERVICE.full_name, READINESS)
        self._scrapes: Any = None
        self._sockets: dict[Path, int] = {}  # path -> inode
        # Far over the limit of a text, so that the answer to one that is too long comes from us and names the limit.
        longest = 4 * config.limits.text_bytes + (16 << 20)
        self._grpc = grpc.aio.server(
            options=[
                *connection.OF_SERVER,
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", min(longest, (1 << 31) - 1)),
            ]
        )
        self._taps: TapServicer | None = None
        self._tap_grpc: Any = None

    async def start(self) -> Addresses:
        """Raises ConfigError naming the address that cannot be listened on, or the TLS file that cannot be used."""
        try:
            return await self._start()
        except BaseException:
            await self.stop(grace_seconds=0)
            raise

    async def _start(self) -> Addresses:
        self._grpc.add_registered_method_handlers(SERVICE.full_name, self._servicer.handlers())
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = (SERVICE.full_name, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self._grpc)
        check_server(self._config.server)
        tls = credentials(self._config.server)
        listening = tuple(self._listen(self._grpc, "server.listen", a, tls) for a in self._config.server.listen)
        tapped = await self._listen_for_taps(self._config.server.taps)
        scraped = self._listen_for_scrapes(self._config.server.metrics)
        self._assessor.observer = self.metrics
        await self._health.serving()
        await self._grpc.start()
        return Addresses(listening, scraped, tapped)

    async def _listen_for_taps(self, address: str) -> str:
        """Taps are trusted and callers are not: a server of its own, which callers cannot reach."""
        if not address:
            return ""
        observed, loop = self._assessor.observed, asyncio.get_running_loop()
        self._taps = TapServicer(observed)
        self._tap_threads = ThreadPoolExecutor(_TAPS, "guard-taps")
        options = [*connection.OF_SERVER, ("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)]
        # One tap more is refused at once: it would wait for a thread, and nobody would know.
        self._tap_grpc = grpc.server(self._tap_threads, options=options, maximum_concurrent_rpcs=_TAPS)
        self._tap_grpc.add_registered_method_handlers(TAP_SERVICE.full_name, self._taps.handlers())
        bound = self._listen(self._tap_grpc, "server.taps", address, None)

        def trouble(what: str) -> None:  # on the thread that reads the taps
            asyncio.run_coroutine_threadsafe(self._health.one(TAPS, serving=not what), loop)
            if what:
                _log.warning("taps are not serving", reason=what)

        observed.on_trouble = trouble
        await self._health.one(TAPS, serving=True)
        self._tap_grpc.start()
        return bound

    def _listen(self, server: Any, key: str, address: str, tls: Any) -> str:
        path = unix_path(address)
        host = ""
        if path is not None:
            clear_stale_socket(address, path, key)
        else:
            host, _ = split_host_port(key, address)
        try:
            port = server.add_secure_port(address, tls) if tls else server.add_insecure_port(address)
        except RuntimeError:
            reason = why_not(key, address) or "cannot listen there"
            raise ConfigError(f"{key}: {address}: {reason}") from None
        if path is not None:
            self._sockets[path] = path.stat().st_ino
            return address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _listen_for_scrapes(self, address: str) -> str:
        if not address:
            return ""
        host, port = split_host_port("server.metrics", address)
        try:
            self._scrapes, _ = start_http_server(port, host, self.metrics.registry)
        except OSError as error:
            raise ConfigError(f"server.metrics: {address}: {error.strerror or error}") from None
        return f"[{host}]:{self._scrapes.server_port}" if ":" in host else f"{host}:{self._scrapes.server_port}"

    async def stop(self, *, grace_seconds: float | None = None) -> None:
        """Health turns NOT_SERVING at once; calls in flight have the grace to end; then everything is let go.

        For half of the grace at most, new calls are still served while callers learn to go elsewhere; it is shorter
        when no call is in flight.
        """
        grace = self._config.server.grace_seconds if grace_seconds is None else grace_seconds
        ends = time.monotonic() + grace
        await self._health.draining()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._servicer.idle.wait(), grace / 2)
        self._health.end_watches()
        await self._grpc.stop(max(0.0, ends - time.monotonic()))
        if self._tap_grpc is not None and self._taps is not None:
            await self._health.one(TAPS, serving=False)
            self._assessor.observed.on_trouble = lambda _: None
            self._tap_grpc.stop(0)
            await asyncio.to_thread(self._tap_threads.shutdown)
        if self._assessor.observer is self.metrics:
            self._assessor.observer = self._observer_before
        if self._scrapes is not None:
            await asyncio.to_thread(self._scrapes.shutdown)
            self._scrapes.server_close()
        for path, inode in self._sockets.items():
            with contextlib.suppress(OSError):
                if path.stat().st_ino == inode:  # not one of a server that came after us
                    path.unlink()


async def serve(
    config: GuardConfig,
    assessor: Assessor,
    *,
    ready: Callable[[Addresses], None] = lambda _: None,
    until: asyncio.Event | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, or until `until` is set (the caller then owns the signals); closes the assessor.

    `ready` is called once, on the event loop, when everything listens. Raises ConfigError.
    """
    end = until or asyncio.Event()
    loop = asyncio.get_running_loop()
    owned = () if until else (signal.SIGTERM, signal.SIGINT)
    for number in owned:
        loop.add_signal_handler(number, end.set)
    try:
        server = Server(config, assessor)
        bound = await server.start()
        try:
            ready(bound)
            await end.wait()
        finally:
            await server.stop()
    finally:
        await asyncio.to_thread(assessor.close)
        for number in owned:
            loop.remove_signal_handler(number)


def run(
    config: GuardConfig,
    *,
    report: Callable[[str], None] = lambda _: None,
    ready: Callable[[Addresses], None] = lambda _: None,
) -> None:
    """Loads the assessor and serves until a signal. Raises ConfigError, PackError and WeightsError."""
    check_server(config.server)  # before a model is loaded for nothing
    assessor = Assessor.load(config, report=report)
    _log.info(
        "loaded",
        pack=assessor.pack.manifest.id,
        model=config.reader.model,
        reader_dtype=assessor.reader_dtype,
        encode_backend=assessor.encode_backend,
    )
    spare_the_collector()
    uvloop.run(serve(config, assessor, ready=ready))


def spare_the_collector() -> None:
    """Python's cycle collector leaves alone what is loaded by now.

    torch and a model are a million objects that stay: to walk them takes 0.3 s, and the hundreds of small objects of
    every verdict bring such a walk on once in a few hundred checks.
    """
    gc.collect()
    gc.freeze()
