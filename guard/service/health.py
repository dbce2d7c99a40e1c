"""Standard health by named components. `liveness` goes on serving while the rest drains: that is no reason to kill."""

import asyncio
from typing import Any

from grpc_health.v1 import health, health_pb2

LIVENESS = "liveness"
TAPS = "taps"


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # the library ships no types
    """As the library's, and its watches end when the server stops, instead of holding the stop up."""

    def __init__(self, *components: str) -> None:
        super().__init__()
        self._components = ("", *components)
        self._watches: set[asyncio.Task[None]] = set()

    async def serving(self) -> None:
        for component in (*self._components, LIVENESS):
            await self.set(component, health_pb2.HealthCheckResponse.SERVING)

    async def one(self, component: str, *, serving: bool) -> None:
        """A component that comes and goes while the others stand."""
        status = health_pb2.HealthCheckResponse
        await self.set(component, status.SERVING if serving else status.NOT_SERVING)

    async def draining(self) -> None:
        for component in self._components:
            await self.set(component, health_pb2.HealthCheckResponse.NOT_SERVING)

    def end_watches(self) -> None:
        for watch in self._watches:
            watch.cancel()

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802 - the service's own name
        watch = asyncio.ensure_future(super().Watch(request, context))
        self._watches.add(watch)
        try:
            await asyncio.wait([watch])
            if not watch.cancelled():
                watch.result()
        finally:
            watch.cancel()
            self._watches.discard(watch)
