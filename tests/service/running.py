"""A server in a thread of this process, on ephemeral ports."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvloop

from guard.config import GuardConfig, load_config
from guard.service.addresses import Addresses
from guard.service.server import Server


def make_config(**sections) -> GuardConfig:
    """Port 0 everywhere, unless told otherwise."""
    server = {"listen": ["127.0.0.1:0"], "metrics": "127.0.0.1:0", "grace_seconds": 1} | sections.pop("server", {})
    return load_config(overrides={"server": server, **sections})


@dataclass
class Running:
    server: Server
    bound: Addresses

    @property
    def address(self) -> str:
        return self.bound.grpc[0]


@contextmanager
def running(config: GuardConfig, assessor) -> Iterator[Running]:
    """Raises here what the server raises when it starts."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> Running:
        server = Server(config, assessor)
        return Running(server, await server.start())

    started = None
    try:
        started = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
        yield started
    finally:
        if started is not None:
            asyncio.run_coroutine_threadsafe(started.server.stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()
