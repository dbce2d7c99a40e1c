"""TapService on an assessor's observed requests: a tap's hello is checked, its steps are read in their order."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import structlog

from guard.assessor.observed import Link, Observed
from guard.errors import ConfigError, GuardError, InvalidInput
from guard.service import errors, wire
from guard.tap.protocol import TapInfo

_log = structlog.get_logger("guard.service")


class TapServicer:
    """Must be used on one event loop; steps are read on a thread, so that callers are answered meanwhile."""

    def __init__(self, observed: Observed) -> None:
        self._observed = observed
        self._thread = ThreadPoolExecutor(1, "guard-taps")

    def handlers(self) -> dict[str, Any]:
        """By method name, what a grpc server registers. Messages stay bytes up to that thread."""
        return {wire.METHOD: grpc.stream_stream_rpc_method_handler(self._observe)}

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    async def _observe(self, requests: AsyncIterator[bytes], context: Any) -> None:
        loop = asyncio.get_running_loop()
        link: Link | None = None
        try:
            async for request in requests:
                if link is None:
                    link = await loop.run_in_executor(self._thread, self._welcome, request)
                    await context.write(wire.welcome_bytes(accepted=True))
                    _log.info("tap connected", engine=link.info.engine, version=link.info.engine_version)
                    continue
                for request_id in await loop.run_in_executor(self._thread, _take, link, request):
                    await context.write(wire.stop_bytes(request_id))
        except ConfigError as error:
            _log.error("tap refused", reason=str(error))
            await context.write(wire.welcome_bytes(accepted=False, message=str(error)))
        except GuardError as error:
            status = errors.to_status(error)
            await context.abort(status.code, status.details, status.trailing_metadata)
        except Exception:  # noqa: BLE001 - the tap learns that it failed; the log learns why
            _log.exception("tap failed")
            status = errors.to_status(GuardError("internal error: the sidecar's log says more"))
            await context.abort(status.code, status.details, status.trailing_metadata)
        finally:
            if link is not None:
                left = len(link.open)
                # Also where this call was cancelled: then nothing can be awaited any more.
                self._thread.submit(link.close)
                _log.info("tap disconnected", engine=link.info.engine, open_requests=left)

    def _welcome(self, request: bytes) -> Link:
        info = wire.read_request(request)
        if not isinstance(info, TapInfo):
            raise InvalidInput("found a step, expected hello first", reason="UNEXPECTED_MESSAGE")
        return self._observed.connect(info)


def _take(link: Link, request: bytes) -> list[str]:
    """Reads a step; the requests whose generation is to end from now on."""
    before = set(link.stops)
    read = wire.read_request(request)
    if isinstance(read, TapInfo):
        raise InvalidInput("found a second hello, expected steps", reason="UNEXPECTED_MESSAGE")
    step, dropped = read
    link.take(step, dropped=dropped)
    return sorted(link.stops - before)
