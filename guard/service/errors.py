"""GuardError to a gRPC status with google.rpc details (AIP-193), and back."""

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from guard.errors import (
    ConfigError,
    Exhausted,
    GuardError,
    InvalidInput,
    NotFound,
    PackError,
    SessionExpired,
    Unavailable,
    WeightsError,
)

DOMAIN = "guard.v1"
_DETAILS_KEY = "grpc-status-details-bin"
_LONGEST = 300  # characters of a message or of a metadata value: HTTP/2 headers are small (8 KiB)

_CODES: dict[type[GuardError], grpc.StatusCode] = {
    InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    SessionExpired: grpc.StatusCode.ABORTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
}
_BY_REASON: dict[str, type[GuardError]] = {kind.reason: kind for kind in (ConfigError, PackError, WeightsError)}


def code_of(error: GuardError) -> grpc.StatusCode:
    return next((code for kind, code in _CODES.items() if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def to_status(error: GuardError) -> Any:
    """A grpc.Status with its code, details and trailing metadata."""
    status = status_pb2.Status(code=code_of(error).value[0], message=_shorten(str(error)))
    metadata = {key: _shorten(value) for key, value in error.metadata.items()}
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata))
    if isinstance(error, Exhausted):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_after_s * 1000))
        status.details.add().Pack(retry)
    return rpc_status.to_status(status)


def from_rpc_error(error: Any) -> GuardError:
    """The GuardError that the server raised, rebuilt from `error` (a grpc.RpcError that is also a grpc.Call)."""
    code, message = error.code(), error.details() or ""
    info, retry_after_s = _details(error)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and info is None:
        # Not ours: grpc itself refuses a message that is far over the limit of a request's text.
        return InvalidInput(message, reason="MESSAGE_TOO_LARGE")
    reason = info.reason if info else code.name
    metadata = dict(info.metadata) if info else {}
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        kind: GuardError = Exhausted(message, retry_after_s=retry_after_s, reason=reason)
    else:
        kind = _kind(code, reason)(message, reason=reason)
    kind.metadata = metadata
    return kind


def _kind(code: grpc.StatusCode, reason: str) -> type[GuardError]:
    by_code = {known: kind for kind, known in _CODES.items()}
    return by_code.get(code) or _BY_REASON.get(reason, GuardError)


def _details(error: Any) -> tuple[Any, float]:
    """The ErrorInfo, if there is one of ours, and the seconds of the RetryInfo."""
    info, retry_after_s = None, 0.0
    for key, value in error.trailing_metadata() or ():
        if key != _DETAILS_KEY:
            continue
        try:
            status = status_pb2.Status.FromString(value)
        except DecodeError:  # a proxy may have cut it: the code and the message still stand
            continue
        for detail in status.details:
            found, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(found) and found.domain == DOMAIN:
                info = found
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    return info, retry_after_s


def _shorten(text: str) -> str:
    whole = text.encode("utf-8", "replace").decode()  # a lone surrogate has no UTF-8
    return whole if len(whole) <= _LONGEST else whole[: _LONGEST - 1] + "…"
