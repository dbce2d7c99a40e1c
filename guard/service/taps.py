"""TapService on an assessor's observed requests: a tap's hello is checked, its steps are read in their order."""

from collections.abc import Iterator
from typing import Any

import grpc
import structlog

from guard.assessor.links import Link
from guard.assessor.observed import Observed
from guard.errors import ConfigError, GuardError, InvalidInput
from guard.service import errors, wire
from guard.tap.protocol import TapInfo

_log = structlog.get_logger("guard.service")


class TapServicer:
    """For a server with threads, where each tap has one: a step then wakes nobody but the thread that reads it."""

    def __init__(self, observed: Observed) -> None:
        self._observed = observed

    def handlers(self) -> dict[str, Any]:
        """By method name, what a grpc server registers. Messages stay bytes up to the tap's thread."""
        return {wire.METHOD: grpc.stream_stream_rpc_method_handler(self._observe)}

    def _observe(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        link: Link | None = None
        try:
            for request in requests:
                if link is None:
                    link = self._welcome(request)
                    yield wire.welcome_bytes(accepted=True)
                    _log.info("tap connected", engine=link.info.engine, version=link.info.engine_version)
                    continue
                for request_id in _take(link, request):
                    yield wire.stop_bytes(request_id)
        except ConfigError as error:
            _log.error("tap refused", reason=str(error))
            yield wire.welcome_bytes(accepted=False, message=str(error))
        except GuardError as error:
            _abort(context, error)
        except grpc.RpcError:  # how reading says that the tap has gone: its engine ended, or was cut off
            pass
        except Exception:  # noqa: BLE001 - the tap learns that it failed; the log learns why
            _log.exception("tap failed")
            _abort(context, GuardError("internal error: the sidecar's log says more"))
        finally:
            if link is not None:
                left = len(link.open)
                link.close()
                _log.info("tap disconnected", engine=link.info.engine, open_requests=left)

    def _welcome(self, request: bytes) -> Link:
        info = wire.read_request(request)
        if not isinstance(info, TapInfo):
            raise InvalidInput("found a step, expected hello first", reason="UNEXPECTED_MESSAGE")
        return self._observed.connect(info)


def _abort(context: grpc.ServicerContext, error: GuardError) -> None:
    status = errors.to_status(error)
    context.set_trailing_metadata(status.trailing_metadata)
    context.abort(status.code, status.details)


def _take(link: Link, request: bytes) -> list[str]:
    """Reads a step; the requests whose generation is to end from now on."""
    read = wire.read_request(request)
    if isinstance(read, TapInfo):
        raise InvalidInput("found a second hello, expected steps", reason="UNEXPECTED_MESSAGE")
    step, dropped = read
    link.take(step, dropped=dropped)
    return link.stops_to_send()
