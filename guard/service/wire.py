"""Steps of a tap to messages and back. Light: protobuf and numpy, for it runs in the engine's process too."""

from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from guard.errors import InvalidInput
from guard.service.pb.guard.v1 import tap_pb2 as pb
from guard.tap.protocol import Ended, Missed, Rows, Step, TapInfo

SERVICE = pb.DESCRIPTOR.services_by_name["TapService"]
METHOD = "Observe"

_INT, _FLOAT = np.dtype("<i4"), np.dtype("<f4")


def request_bytes(given: TapInfo | Step, dropped: int = 0) -> bytes:
    """An ObserveRequest; `dropped` counts the steps not handed over, but for those told on earlier connections."""
    request = pb.ObserveRequest()
    if isinstance(given, TapInfo):
        request.hello.CopyFrom(
            pb.Hello(
                engine=given.engine,
                engine_version=given.engine_version,
                pack_hash=given.pack_hash,
                model=given.model,
                hook_points=given.hook_points,
                dtype=given.dtype,
            )
        )
    else:
        step = request.step
        step.SetInParent()
        step.dropped = dropped
        for rows in given.rows:
            step.rows.add(
                request_id=rows.request_id,
                begin=rows.begin,
                prompt_tokens=rows.prompt_tokens,
                token_ids=_bytes(rows.token_ids, _INT),
                token=_bytes(rows.token, _INT),
                row=_bytes(rows.row, _INT),
                value=_bytes(rows.value, _FLOAT),
                probe=_bytes(rows.probe, _FLOAT),
                finite=rows.finite,
            )
        for missed in given.missed:
            step.missed.add(request_id=missed.request_id, detail=missed.detail)
        for ended in given.ended:
            step.ended.add(request_id=ended.request_id, reason=ended.reason, tokens=ended.tokens)
    return bytes(request.SerializeToString())


def read_request(wire: bytes) -> TapInfo | tuple[Step, int]:
    """A hello, or a step and what was dropped so far. Raises InvalidInput for anything else."""
    try:
        request = pb.ObserveRequest.FromString(wire)
    except DecodeError as error:
        raise InvalidInput(f"{error}; expected guard.v1.ObserveRequest", reason="MALFORMED_MESSAGE") from None
    kind = request.WhichOneof("message")
    if kind == "hello":
        hello = request.hello
        return TapInfo(
            hello.engine, hello.engine_version, hello.pack_hash, hello.model, tuple(hello.hook_points), hello.dtype
        )
    if kind != "step":
        raise InvalidInput("found an empty message, expected hello or step", reason="UNEXPECTED_MESSAGE")
    step = request.step
    return (
        Step(
            tuple(_rows(rows) for rows in step.rows),
            tuple(Missed(missed.request_id, missed.detail) for missed in step.missed),
            tuple(Ended(ended.request_id, ended.reason, ended.tokens) for ended in step.ended),
        ),
        step.dropped,
    )


def _rows(rows: Any) -> Rows:
    for name in ("token_ids", "token", "row", "value", "probe"):
        if (size := len(getattr(rows, name))) % 4:
            raise InvalidInput(
                f"rows of {rows.request_id!r}: found {size} bytes of {name}, expected 4 of each value",
                reason="MALFORMED_MESSAGE",
            )
    ids = np.frombuffer(rows.token_ids, _INT)
    token, row = np.frombuffer(rows.token, _INT), np.frombuffer(rows.row, _INT)
    value, probe = np.frombuffer(rows.value, _FLOAT), np.frombuffer(rows.probe, _FLOAT)
    if not len(ids) or len(probe) % len(ids) or not len(token) == len(row) == len(value):
        raise InvalidInput(
            f"rows of {rows.request_id!r}: found {len(ids)} tokens, {len(token)} token indices, {len(row)} rows, "
            f"{len(value)} values and {len(probe)} probe values, expected as many of each hit, and probes by token",
            reason="MALFORMED_MESSAGE",
        )
    return Rows(
        rows.request_id,
        rows.begin,
        rows.prompt_tokens,
        ids,
        token,
        row,
        value,
        probe.reshape(len(ids), -1),
        finite=rows.finite,
    )


def welcome_bytes(*, accepted: bool, message: str = "") -> bytes:
    return bytes(pb.ObserveResponse(welcome=pb.Welcome(accepted=accepted, message=message)).SerializeToString())


def stop_bytes(request_id: str) -> bytes:
    return bytes(pb.ObserveResponse(stop=pb.Stop(request_id=request_id)).SerializeToString())


def read_response(wire: bytes) -> tuple[bool, str] | str:
    """A welcome (accepted or not, and why), or the id of a request to stop."""
    response = pb.ObserveResponse.FromString(wire)
    if response.WhichOneof("message") == "welcome":
        return response.welcome.accepted, response.welcome.message
    return str(response.stop.request_id)


def _bytes(values: NDArray[Any], dtype: np.dtype[Any]) -> bytes:
    return np.ascontiguousarray(values, dtype).tobytes()
