"""Check, ListFeatures, GetFeature and GetPack over a real connection; errors as callers of any language see them."""

import base64
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from guard.errors import (
    ConfigError,
    Exhausted,
    GuardError,
    InvalidInput,
    NotFound,
    PackError,
    SessionExpired,
    Unavailable,
)
from guard.records import CheckInput, CheckOptions, LatentId, Message, Role
from guard.service.client import GuardClient
from guard.service.pb.guard.v1 import guard_pb2 as pb
from guard.service.pb.guard.v1 import guard_pb2_grpc
from tests.service.running import make_config, running
from tests.service.standin import LATENTS, StandIn, make_verdict


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield guard_pb2_grpc.GuardServiceStub(channel)


@pytest.fixture
def raw(server):
    """Sends bytes as they are, as a caller with a broken encoder would."""
    with grpc.insecure_channel(server.address) as channel:
        yield channel.unary_unary("/guard.v1.GuardService/Check")


def details(error):
    """The status's details by type."""
    (wire,) = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    found = {}
    for detail in status_pb2.Status.FromString(wire).details:
        kind = getattr(error_details_pb2, detail.TypeName().rpartition(".")[2])
        found[kind.__name__] = kind()
        detail.Unpack(found[kind.__name__])
    return found


def test_no_proxy_is_asked_for_a_sidecar(monkeypatch):
    monkeypatch.delenv("no_proxy")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    config = make_config()
    with running(config, StandIn(config)) as server, GuardClient(server.address) as client:
        assert client.check("x").action == "allow"


def test_a_check_brings_the_whole_verdict_back(client, standin):
    options = CheckOptions(domains=("violence",), max_attributions=2, token_detail=True, request_id="r-7")
    assert client.check("hello", options=options) == make_verdict("hello", "r-7")
    assert standin.given == [(CheckInput("hello"), options)]


def test_a_block_is_a_normal_answer(client):
    assert client.check("block this").action == "block"


def test_chat_and_completion_arrive_as_they_are(client, standin):
    chat = (Message(Role.SYSTEM, "be kind"), Message(Role.USER, "<|im_start|>system\n你好 👩‍👩‍👧"))
    client.check(chat, completion="fine")
    assert standin.given[0][0] == CheckInput(chat, "fine")


def test_many_callers_get_their_own_answers(client):
    def ask(number):
        return client.check(f"sleep 0.0{number % 10} {number}", options=CheckOptions(request_id=str(number)))

    with ThreadPoolExecutor(16) as callers:
        assert [v.request_id for v in callers.map(ask, range(64))] == [str(number) for number in range(64)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidInput("prompt: too long", reason="TEXT_TOO_LARGE", limit=5), grpc.StatusCode.INVALID_ARGUMENT),
        (NotFound("unknown domain 'x'", reason="UNKNOWN_DOMAIN"), grpc.StatusCode.NOT_FOUND),
        (Exhausted("queue full", retry_after_s=1.25, reason="QUEUE_FULL"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (SessionExpired("stood idle"), grpc.StatusCode.ABORTED),
        (PackError("rows: wrong"), grpc.StatusCode.INTERNAL),
    ],
)
def test_an_error_keeps_its_kind_reason_and_metadata(client, stub, standin, error, code):
    standin.error = error
    with pytest.raises(grpc.RpcError) as seen:
        stub.Check(pb.CheckRequest(text="x"))
    assert seen.value.code() is code
    assert seen.value.details() == str(error)
    info = details(seen.value)["ErrorInfo"]
    assert (info.reason, info.domain, dict(info.metadata)) == (error.reason, "guard.v1", error.metadata)

    with pytest.raises(type(error)) as rebuilt:
        client.check("x")
    assert (str(rebuilt.value), rebuilt.value.reason) == (str(error), error.reason)
    assert rebuilt.value.metadata == error.metadata


def test_a_full_queue_says_when_to_try_again(client, stub, standin):
    standin.error = Exhausted("queue full", retry_after_s=1.25)
    with pytest.raises(grpc.RpcError) as seen:
        stub.Check(pb.CheckRequest(text="x"))
    assert details(seen.value)["RetryInfo"].retry_delay.ToMilliseconds() == 1250
    with pytest.raises(Exhausted) as rebuilt:
        client.check("x")
    assert rebuilt.value.retry_after_s == 1.25


def test_a_fault_of_ours_tells_the_caller_nothing_of_the_inside(client, stub, standin):
    standin.error = RuntimeError("secret path")
    with pytest.raises(GuardError, match=r"^internal error: the server's log says more$"):
        client.check("x")
    with pytest.raises(grpc.RpcError) as seen:
        stub.Check(pb.CheckRequest(text="x"))
    info = details(seen.value)["ErrorInfo"]
    assert (seen.value.code(), info.reason, info.domain) == (grpc.StatusCode.INTERNAL, "INTERNAL", "guard.v1")
    standin.error = None
    assert client.check("x").action == "allow"


def test_a_call_without_an_id_is_given_one(client, standin):
    given = [client.check("x").request_id for _ in range(2)]
    assert all(len(made_up) == 32 for made_up in given)
    assert given[0] != given[1]
    assert [options.request_id for _, options in standin.given] == given


def test_a_long_message_is_cut_instead_of_breaking_the_call(client, standin):
    standin.error = InvalidInput("é" * 10_000 + "\ud800", found="中" * 10_000)
    with pytest.raises(InvalidInput) as rebuilt:
        client.check("x")
    assert str(rebuilt.value) == "é" * 299 + "…"


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        (b"\x12\x02\xff\xfe", "String field had bad UTF-8"),
        (b"\x12\x03\xed\xa0\x80", "String field had bad UTF-8"),  # a lone surrogate
        (b"\x12\xff", "Wire format was corrupt"),
    ],
)
def test_bytes_that_are_no_request_are_the_callers_fault(raw, wire, message):
    with pytest.raises(grpc.RpcError) as seen:
        raw(wire)
    assert seen.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert seen.value.details() == (
        f"Error parsing message with type 'guard.v1.CheckRequest': {message}; expected protobuf with strings in UTF-8"
    )
    assert details(seen.value)["ErrorInfo"].reason == "MALFORMED_MESSAGE"


def test_an_unknown_role_is_named(stub):
    chat = pb.Chat(messages=[pb.Message(role=pb.ROLE_USER, content="a"), pb.Message(role=42, content="b")])
    with pytest.raises(grpc.RpcError) as seen:
        stub.Check(pb.CheckRequest(chat=chat))
    assert seen.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert seen.value.details() == "message 1: found role 42, expected one of system, user, assistant"


def test_too_many_messages_or_domains_are_refused_unread(stub, standin):
    """Before they are converted, which takes seconds for millions: hence no word of the role that there is not."""
    many = pb.Chat(messages=[pb.Message(role=42)] * (standin.config.limits.messages + 1))
    with pytest.raises(grpc.RpcError) as seen:
        stub.Check(pb.CheckRequest(chat=many))
    assert seen.value.details() == "chat: found 1025 messages, the limit is 1024 (limits.messages)"
    with pytest.raises(grpc.RpcError) as seen:
        list(stub.Watch(iter([pb.WatchRequest(chat=many)])))
    assert details(seen.value)["ErrorInfo"].reason == "TOO_MANY_MESSAGES"
    with pytest.raises(grpc.RpcError) as seen:
        stub.Check(pb.CheckRequest(text="x", options=pb.CheckOptions(domains=["violence"] * 1001)))
    assert seen.value.details() == "domains: found 1001, expected 1000 at most"
    assert standin.given == []


def test_a_text_over_the_limit_is_answered_by_us_and_not_by_grpc():
    standin = StandIn(make_config(limits={"text_bytes": 1000}))
    with running(standin.config, standin) as server, GuardClient(server.address) as client:
        for size in (2_000, 2_000_000, 15_000_000):
            with pytest.raises(InvalidInput, match=r"^the limit is 1000 \(limits.text_bytes\)$") as raised:
                client.check("x" * size)
            assert raised.value.reason == "TEXT_TOO_LARGE"
        with pytest.raises(InvalidInput, match="message larger than max") as raised:
            client.check("x" * 17_000_000)
        assert raised.value.reason == "MESSAGE_TOO_LARGE"


def wait_for(condition, seconds=5.0):
    ends = time.monotonic() + seconds
    while not condition() and time.monotonic() < ends:
        time.sleep(0.01)
    return condition()


def test_a_deadline_frees_the_place_in_the_queue(server, standin):
    with GuardClient(server.address, timeout_s=0.2) as client, pytest.raises(GuardError) as raised:
        client.check("never")
    assert raised.value.reason == "DEADLINE_EXCEEDED"
    assert wait_for(standin.futures[0].cancelled)
    assert standin.queue_depth == 0


def test_a_cancelled_call_frees_the_place_in_the_queue(stub, standin):
    call = stub.Check.future(pb.CheckRequest(text="never"))
    assert wait_for(lambda: standin.queue_depth == 1)
    call.cancel()
    assert wait_for(standin.futures[0].cancelled)


def test_features_come_page_by_page_in_order(client, stub):
    wanted = [LatentId(point, latent) for point, latent, _ in LATENTS]
    assert [feature.latent for feature in client.features()] == wanted
    first = stub.ListFeatures(pb.ListFeaturesRequest(page_size=2))
    assert (len(first.features), first.total_size) == (2, 3)
    second = stub.ListFeatures(pb.ListFeaturesRequest(page_size=2, page_token=first.next_page_token))
    assert [f.latent.index for f in (*first.features, *second.features)] == [latent.index for latent in wanted]
    assert second.next_page_token == ""


def test_features_can_be_filtered(client):
    assert [f.latent.index for f in client.features(domain="terror")] == [40_000]
    assert [f.latent.index for f in client.features(hook_point="model.layers.9")] == [5]
    with pytest.raises(NotFound, match=r"^unknown domain 'x', expected one of: violence, terror$"):
        list(client.features(domain="x"))


def test_a_page_token_belongs_to_its_filters(stub):
    token = stub.ListFeatures(pb.ListFeaturesRequest(page_size=1)).next_page_token
    for request in (
        pb.ListFeaturesRequest(page_token=token, domain="violence"),
        pb.ListFeaturesRequest(page_token="%%%"),
        pb.ListFeaturesRequest(page_token="bm8="),
        pb.ListFeaturesRequest(page_token=base64.b64encode(base64.b64decode(token).replace(b"1", b"-5", 1)).decode()),
    ):
        with pytest.raises(grpc.RpcError) as seen:
            stub.ListFeatures(request)
        assert seen.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert seen.value.details() == "page_token: is not the next_page_token of a response with these filters"
    with pytest.raises(grpc.RpcError) as seen:
        stub.ListFeatures(pb.ListFeaturesRequest(page_size=-1))
    assert seen.value.details() == "page_size: found -1, expected 0 to 1000"


def test_one_feature(client, stub):
    assert client.feature(LatentId("model.layers.9", 5)).scores == {"specificity": 0.25}
    with pytest.raises(NotFound, match=r"^unknown latent model\.layers\.9/6$"):
        client.feature(LatentId("model.layers.9", 6))
    with pytest.raises(grpc.RpcError) as seen:
        stub.GetFeature(pb.GetFeatureRequest())
    assert seen.value.details() == "latent: found none, expected a hook point and an index"


def test_the_pack_says_what_it_judges_with(client):
    found = client.pack()
    assert found["pack"] == {"id": "stand-in", "version": "1.2.3", "hash": "h" * 64}
    assert found["model"] == {"fingerprint": "w" * 64, "verified": True}
    assert (found["encode_backend"], found["reader_dtype"], found["calibrated"]) == ("reference", "float32", True)
    assert [point["name"] for point in found["hook_points"]] == ["model.layers.3", "model.layers.9"]


def test_nobody_there_is_unavailable():
    with GuardClient("127.0.0.1:1", timeout_s=5) as client, pytest.raises(Unavailable) as raised:
        client.check("x")
    assert raised.value.reason == "UNAVAILABLE"


def test_a_client_names_the_file_it_cannot_read(tmp_path):
    with pytest.raises(ConfigError) as raised:
        GuardClient("127.0.0.1:1", tls_ca=tmp_path / "ca.pem")
    assert str(raised.value) == f"{tmp_path}/ca.pem: No such file or directory"


def test_one_client_serves_many_threads(client):
    barrier = threading.Barrier(8)

    def ask(number):
        barrier.wait(5)
        return client.check(f"text {number}").phases[0].domains[0].heads[0].attributions[0].spans[0].end

    with ThreadPoolExecutor(8) as callers:
        assert list(callers.map(ask, range(8))) == [6] * 8
