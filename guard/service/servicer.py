"""GuardService on an assessor: what arrives is checked and turned into records, what comes back into messages."""

import asyncio
import base64
import binascii
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from guard.assessor import Assessor, Session
from guard.assessor.limits import check_count
from guard.assessor.session import stood_idle
from guard.errors import GuardError, InvalidInput
from guard.records import CheckOptions, Phase, Verdict
from guard.service import connection, convert, errors
from guard.service.following import following
from guard.service.metrics import Metrics
from guard.service.outcome import Outcome
from guard.service.pb.guard.v1 import guard_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["GuardService"]
PAGE_SIZE, MAX_PAGE_SIZE = 50, 1000

_log = structlog.get_logger("guard.service")


@dataclass(frozen=True, slots=True)
class _Malformed:
    """Bytes that are not the message they should be: grpc itself would call that our fault (INTERNAL)."""

    problem: str


class GuardServicer:
    """Must be used on one event loop. `idle` is set whenever no call is in flight."""

    def __init__(self, assessor: Assessor, metrics: Metrics) -> None:
        self._assessor, self._metrics = assessor, metrics
        self._in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()

    def handlers(self) -> dict[str, Any]:
        """By method name, what a grpc server registers."""
        unary = {
            "Check": self._check,
            "ListFeatures": self._list_features,
            "GetFeature": self._get_feature,
            "GetPack": self._get_pack,
        }
        found: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(self._unary(name, answer), **_codec(name))
            for name, answer in unary.items()
        }
        found["Follow"] = grpc.unary_stream_rpc_method_handler(self._follow, **_codec("Follow"))
        found["Watch"] = grpc.stream_stream_rpc_method_handler(self._watch, **_codec("Watch"))
        return found

    # -- methods

    async def _check(self, request: pb.CheckRequest) -> pb.CheckResponse:
        options = _options(request)
        check_count(len(request.chat.messages), self._assessor.config.limits)  # millions of them take long to convert
        # A cancelled call cancels this await, and that the future: the assessor then frees its place in the queue.
        verdict = await asyncio.wrap_future(self._assessor.submit(convert.input_from_proto(request), options))
        return pb.CheckResponse(verdict=await _verdict_message(verdict, options))

    async def _watch(self, requests: AsyncIterator[Any], context: Any) -> None:
        async with self._call("Watch", context):
            session: Session | None = None
            options, sequence = _options(pb.WatchRequest.Start()), 0
            outcome, judged = Outcome(), None
            try:
                async for received in _without_idling(requests, self._assessor.config.sessions.idle_seconds):
                    request: pb.WatchRequest = _wellformed(received)
                    if request.HasField("start") and session is None:
                        options = _options(request.start)
                        session = self._assessor.open_session(options)
                        continue
                    session = session or self._assessor.open_session(options)
                    started = time.perf_counter()
                    check_count(len(request.chat.messages), self._assessor.config.limits)
                    phase, future = _feed(session, request, sequence)
                    verdict = await asyncio.wrap_future(future)
                    judged = outcome.add(verdict)
                    message = await _verdict_message(verdict, options)
                    self._metrics.chunk(phase, time.perf_counter() - started)  # a caller who reads slowly is not Guard
                    await context.write(pb.WatchResponse(verdict=message, sequence=sequence))
                    sequence += 1
            finally:
                if session is not None:
                    session.close()
                if judged is not None:
                    self._metrics.judged(judged, "watch")

    async def _follow(self, received: Any, context: Any) -> None:
        async with self._call("Follow", context):
            request: pb.FollowRequest = _wellformed(received)
            if not request.request_id:
                raise InvalidInput("request_id: found none, expected the request's own", reason="INVALID_OPTION")
            if request.options.token_detail:
                raise InvalidInput("token_detail: cannot be had of a tapped request", reason="INVALID_OPTION")
            options = convert.options_from_proto(request.options, request.request_id)

            async def announced() -> None:
                await context.send_initial_metadata(((connection.ANNOUNCED, "1"),))

            async with aclosing(following(self._assessor, options, announced, upcoming=request.upcoming)) as states:
                async for progress in states:
                    await context.write(convert.progress_to_proto(progress))

    async def _list_features(self, request: pb.ListFeaturesRequest) -> pb.ListFeaturesResponse:
        if request.page_size < 0:
            raise InvalidInput(
                f"page_size: found {request.page_size}, expected 0 to {MAX_PAGE_SIZE}", reason="INVALID_OPTION"
            )
        filters = (request.domain, request.subdomain, request.hook_point)
        begin = _read_token(request.page_token, filters) if request.page_token else 0
        found = self._assessor.features(domain=filters[0], subdomain=filters[1], hook_point=filters[2])
        end = begin + min(request.page_size or PAGE_SIZE, MAX_PAGE_SIZE)
        features = await asyncio.to_thread(lambda: [convert.feature_to_proto(feature) for feature in found[begin:end]])
        return pb.ListFeaturesResponse(
            features=features,
            next_page_token=_write_token(end, filters) if end < len(found) else "",
            total_size=len(found),
        )

    async def _get_feature(self, request: pb.GetFeatureRequest) -> pb.GetFeatureResponse:
        if not request.latent.hook_point:
            raise InvalidInput("latent: found none, expected a hook point and an index", reason="INVALID_OPTION")
        feature = self._assessor.feature(convert.latent_from_proto(request.latent))
        return pb.GetFeatureResponse(feature=convert.feature_to_proto(feature))

    async def _get_pack(self, _request: pb.GetPackRequest) -> pb.GetPackResponse:
        assessor = self._assessor
        return convert.pack_to_proto(
            assessor.pack.info,
            assessor.pack.manifest,
            assessor.pack.evaluation,
            model=assessor.model,
            policy=assessor.policy,
            encode_backend=assessor.encode_backend,
            reader_dtype=assessor.reader_dtype,
        )

    # -- what every call shares

    def _unary(self, name: str, answer: Callable[[Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        async def handler(request: Any, context: Any) -> Any:
            async with self._call(name, context):
                return await answer(_wellformed(request))

        return handler

    @asynccontextmanager
    async def _call(self, method: str, context: Any) -> AsyncIterator[None]:
        """Counts and times a call, and turns what it raises into a status."""
        started, code = time.perf_counter(), grpc.StatusCode.OK
        self._in_flight += 1
        self.idle.clear()
        try:
            yield
        except GuardError as error:
            status = errors.to_status(error)
            code = status.code
            await context.abort(status.code, status.details, status.trailing_metadata)
        except asyncio.CancelledError:
            left = context.time_remaining()
            late = left is not None and left <= 0
            code = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        except Exception:  # noqa: BLE001 - the caller learns that it failed; the log learns why
            code = grpc.StatusCode.INTERNAL
            _log.exception("call failed", method=method)
            status = errors.to_status(GuardError("internal error: the server's log says more"))
            await context.abort(status.code, status.details, status.trailing_metadata)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self.idle.set()
            self._metrics.call(method, code.name, time.perf_counter() - started)


def _options(request: pb.CheckRequest | pb.WatchRequest.Start) -> CheckOptions:
    return convert.options_from_proto(request.options, request.request_id or uuid.uuid4().hex)


def _feed(session: Session, request: pb.WatchRequest, sequence: int) -> "tuple[Phase, Future[Verdict]]":
    kind = request.WhichOneof("message")
    if kind == "chat":
        return Phase.PROMPT, session.feed_chat(convert.messages_from_proto(request.chat))
    if kind != "chunk":
        found = "start" if kind else "an empty message"
        raise InvalidInput(
            f"chunk {sequence}: found {found}, expected chunk or chat (start comes once, and first)",
            reason="UNEXPECTED_MESSAGE",
        )
    phase = convert.phase_from_proto(request.chunk.phase)
    if phase is None:
        raise InvalidInput(
            f"chunk {sequence}: found phase {int(request.chunk.phase)}, expected PHASE_PROMPT or PHASE_COMPLETION",
            reason="UNKNOWN_PHASE",
        )
    return phase, session.feed(phase, request.chunk.text, last=request.chunk.last)


async def _without_idling(requests: AsyncIterator[Any], seconds: float) -> AsyncIterator[Any]:
    """Raises SessionExpired where the next message does not come in time: a silent call would stay open for ever."""
    arriving = aiter(requests)
    while True:
        try:
            yield await asyncio.wait_for(anext(arriving), seconds)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise stood_idle(seconds) from None


async def _verdict_message(verdict: Verdict, options: CheckOptions) -> pb.Verdict:
    if options.token_detail:  # a long text has very many tokens: other calls go on meanwhile
        return await asyncio.to_thread(convert.verdict_to_proto, verdict)
    return convert.verdict_to_proto(verdict)


def _codec(method: str) -> dict[str, Any]:
    kind = getattr(pb, SERVICE.methods_by_name[method].input_type.name)

    def parse(wire: bytes) -> Any:
        try:
            return kind.FromString(wire)
        except DecodeError as error:
            return _Malformed(str(error))

    return {"request_deserializer": parse, "response_serializer": lambda message: message.SerializeToString()}


def _wellformed(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise InvalidInput(f"{request.problem}; expected protobuf with strings in UTF-8", reason="MALFORMED_MESSAGE")
    return request


def _write_token(begin: int, filters: tuple[str, ...]) -> str:
    return base64.urlsafe_b64encode(f"{begin}:{_digest(filters)}".encode()).decode()


def _read_token(token: str, filters: tuple[str, ...]) -> int:
    try:
        begin, _, digest = base64.urlsafe_b64decode(token.encode()).decode().partition(":")
        if digest == _digest(filters) and begin.isdigit():
            return int(begin)
    except (ValueError, binascii.Error):
        pass
    raise InvalidInput(
        "page_token: is not the next_page_token of a response with these filters", reason="INVALID_PAGE_TOKEN"
    )


def _digest(filters: tuple[str, ...]) -> str:
    return f"{zlib.crc32(repr(filters).encode()):08x}"
