"""A small synchronous client: records in, records out, and the server's own errors."""

import ssl
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from guard.errors import ConfigError, InvalidInput
from guard.records import CheckInput, CheckOptions, Feature, LatentId, Message, Phase, Verdict
from guard.service import connection, convert, errors
from guard.service.pb.guard.v1 import guard_pb2 as pb
from guard.service.pb.guard.v1 import guard_pb2_grpc

_Stub: Any = guard_pb2_grpc.GuardServiceStub


@dataclass(frozen=True, slots=True)
class Followed:
    """A tapped request so far; `verdict` is None where only the counts have advanced since the one before."""

    verdict: Verdict | None
    prompt_read: int
    completion_read: int
    finish_reason: str  # empty until the last one


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a stream; `last` ends its phase."""

    phase: Phase
    text: str
    last: bool = False


class GuardClient:
    """Talks to one server, from any number of threads.

        with GuardClient("127.0.0.1:50051") as guard:
            verdict = guard.check("some text")

    Every method raises the GuardError that the server raised, Unavailable where no server answers, and InvalidInput for
    what no message can hold. `timeout_s` is the deadline of a call (of a whole stream for `watch` and `follow`, where
    it is off unless given).
    """

    def __init__(
        self,
        address: str,
        *,
        tls_ca: Path | None = None,
        tls_certificate: Path | None = None,
        tls_key: Path | None = None,
        timeout_s: float | None = 60.0,
    ) -> None:
        """`tls_ca` turns TLS on; `tls_certificate` and `tls_key` are the caller's own, for mTLS. Raises ConfigError."""
        self.timeout_s = timeout_s
        options = [
            *connection.OF_CHANNEL,
            ("grpc.max_receive_message_length", -1),  # token detail of a long text is large
            # A sidecar that restarts is back in a moment: grpc itself would wait for up to two minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if tls_ca or tls_certificate or tls_key:
            self._channel = grpc.secure_channel(
                address, _credentials(tls_ca, tls_certificate, tls_key), options=options
            )
        else:
            self._channel = grpc.insecure_channel(address, options=options)
        self._stub = _Stub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def check(
        self,
        prompt: str | tuple[Message, ...] | None = None,
        *,
        completion: str | None = None,
        options: CheckOptions | None = None,
        timeout_s: float | None = None,
    ) -> Verdict:
        """Judges a prompt (text or a chat), a completion behind it, or both; `timeout_s`, where given, is its own."""
        with _sendable("options"):
            request = convert.input_to_proto(CheckInput(prompt, completion), options or CheckOptions())
        return convert.verdict_from_proto(self._call(self._stub.Check, request, timeout_s).verdict)

    def watch(
        self,
        chunks: Iterable[Chunk | tuple[Message, ...]],
        *,
        options: CheckOptions | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Verdict]:
        """The running verdict after each chunk; a tuple of messages is a whole chat as prompt, before any chunk.

        `chunks` is read on another thread as the stream goes; what it raises is raised here.
        """
        raised: list[Exception] = []

        def requests() -> Iterator[pb.WatchRequest]:
            try:
                with _sendable("options"):
                    start = _start(options or CheckOptions())
                yield start
                for chunk in chunks:
                    with _sendable("chunk"):
                        request = _watch_request(chunk)
                    yield request
            except Exception as error:  # not GeneratorExit: grpc closes this generator when the call ends first
                raised.append(error)
                raise

        call = self._stub.Watch(requests(), timeout=timeout_s)
        try:
            for response in call:
                yield convert.verdict_from_proto(response.verdict)
        except grpc.RpcError as error:
            if raised:
                raise raised[0] from None
            raise errors.from_rpc_error(error) from None
        finally:
            call.cancel()  # a caller that stops early frees the stream

    def follow(
        self,
        request_id: str,
        *,
        upcoming: bool = False,
        options: CheckOptions | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Followed]:
        """A request that a tap observes, as it goes, up to its end.

        May be called before the request is sent: with `upcoming` this returns once the sidecar waits for it, or raises
        where it does not, and one of that id which has ended is not meant. An id is best used once.
        `timeout_s` bounds the whole; None leaves that to the request, which the sidecar takes as lost when it stands.
        """
        asked = options or CheckOptions()
        with _sendable("options"):
            request = pb.FollowRequest(
                request_id=request_id, options=convert.options_to_proto(asked), upcoming=upcoming
            )
        call = self._stub.Follow(request, timeout=timeout_s)
        if upcoming and connection.ANNOUNCED not in dict(call.initial_metadata() or ()):
            raise errors.from_rpc_error(call)
        return self._followed(call)

    def _followed(self, call: Any) -> Iterator[Followed]:
        try:
            for response in call:
                verdict = convert.verdict_from_proto(response.verdict) if response.HasField("verdict") else None
                yield Followed(verdict, response.prompt_read, response.completion_read, response.finish_reason)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from None
        finally:
            call.cancel()

    def features(self, *, domain: str = "", subdomain: str = "", hook_point: str = "") -> Iterator[Feature]:
        """The pack's latents, page by page; empty filters let everything through."""
        with _sendable("filters"):
            request = pb.ListFeaturesRequest(domain=domain, subdomain=subdomain, hook_point=hook_point)
        while True:
            page = self._call(self._stub.ListFeatures, request)
            yield from (convert.feature_from_proto(feature) for feature in page.features)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def feature(self, latent: LatentId) -> Feature:
        with _sendable("latent"):
            request = pb.GetFeatureRequest(latent=convert.latent_to_proto(latent))
        return convert.feature_from_proto(self._call(self._stub.GetFeature, request).feature)

    def pack(self) -> dict[str, Any]:
        """GetPackResponse as JSON with proto field names."""
        return convert.message_to_json(self._call(self._stub.GetPack, pb.GetPackRequest()))

    def _call(self, method: Callable[..., Any], request: Any, timeout_s: float | None = None) -> Any:
        try:
            return method(request, timeout=self.timeout_s if timeout_s is None else timeout_s)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from None


def _start(options: CheckOptions) -> pb.WatchRequest:
    start = pb.WatchRequest.Start(request_id=options.request_id, options=convert.options_to_proto(options))
    return pb.WatchRequest(start=start)


def _watch_request(chunk: Chunk | tuple[Message, ...]) -> pb.WatchRequest:
    if isinstance(chunk, Chunk):
        phase = convert.phase_to_proto(chunk.phase)
        return pb.WatchRequest(chunk=pb.WatchRequest.Chunk(phase=phase, text=chunk.text, last=chunk.last))
    return pb.WatchRequest(chat=convert.chat_to_proto(chunk))


@contextmanager
def _sendable(what: str) -> Iterator[None]:
    """What no protobuf message can hold is the caller's to mend: said in the words in which the server would."""
    try:
        yield
    except UnicodeEncodeError as error:
        character = f"U+{ord(error.object[error.start]):04X} at character {error.start}"
        raise InvalidInput(f"text is not valid Unicode: lone surrogate {character}", reason="INVALID_UNICODE") from None
    except ValueError as error:
        raise InvalidInput(f"{what}: {error}", reason="INVALID_OPTION") from None


def _credentials(ca: Path | None, certificate: Path | None, key: Path | None) -> Any:
    """grpc.ChannelCredentials. Raises ConfigError naming a file: grpc would only fail to connect, and not say why."""
    pem = [_pem(file) for file in (ca, key, certificate)]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if ca:
            context.load_verify_locations(ca)
    except ssl.SSLError:
        raise ConfigError(f"{ca}: found no PEM certificate") from None
    try:
        if certificate and key:
            context.load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError as error:
        found = "found no pair of PEM certificate and unencrypted key"
        raise ConfigError(f"{certificate}, {key}: {found}: {error.reason or error}") from None
    return grpc.ssl_channel_credentials(*pem)


def _pem(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
