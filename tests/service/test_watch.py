import threading
import time

import grpc
import pytest

from guard.errors import Exhausted, InvalidInput, SessionExpired
from guard.records import CheckOptions, Message, Phase, Role
from guard.service.client import Chunk, GuardClient
from guard.service.pb.guard.v1 import guard_pb2 as pb
from guard.service.pb.guard.v1 import guard_pb2_grpc
from tests.service.running import make_config, running
from tests.service.standin import StandIn


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.address) as channel:
        yield guard_pb2_grpc.GuardServiceStub(channel)


def chunk(text, phase=pb.PHASE_COMPLETION):
    return pb.WatchRequest(chunk=pb.WatchRequest.Chunk(phase=phase, text=text))


def closed(standin):
    ends = time.monotonic() + 5
    while standin.sessions and time.monotonic() < ends:
        time.sleep(0.01)
    return not standin.sessions


def test_a_verdict_comes_back_for_each_chunk(client, standin):
    chunks = [Chunk(Phase.PROMPT, "ab", last=True), Chunk(Phase.COMPLETION, "cd"), Chunk(Phase.COMPLETION, "block")]
    verdicts = list(client.watch(chunks, options=CheckOptions(request_id="s-1")))
    assert [v.action for v in verdicts] == ["allow", "allow", "block"]
    assert [len(v.phases) for v in verdicts] == [1, 2, 2]
    assert {v.request_id for v in verdicts} == {"s-1"}
    assert closed(standin)


def test_each_answer_says_which_chunk_it_answers(stub):
    requests = [pb.WatchRequest(start=pb.WatchRequest.Start(request_id="s")), *(chunk(text) for text in "abc")]
    assert [response.sequence for response in stub.Watch(iter(requests))] == [0, 1, 2]


def test_start_may_be_left_out_and_the_stream_is_given_an_id(stub):
    first, second = stub.Watch(iter([chunk("a"), chunk("b")]))
    assert first.verdict.action == pb.ACTION_ALLOW
    assert len(first.verdict.request_id) == 32
    assert first.verdict.request_id == second.verdict.request_id


def test_a_verdict_comes_before_the_next_chunk_is_sent(client):
    seen = []

    def chunks():
        for number in range(3):
            while len(seen) < number:  # a caller that waits for the verdict before it goes on
                time.sleep(0.005)
            yield Chunk(Phase.COMPLETION, f"{number} ")

    for verdict in client.watch(chunks(), timeout_s=10):
        seen.append(verdict)  # noqa: PERF402 - chunks() looks at it meanwhile
    assert len(seen) == 3


def test_a_chat_may_be_the_prompt(client):
    chat = (Message(Role.USER, "hello"),)
    (verdict,) = client.watch([chat])
    assert verdict.phases[0].domains[0].heads[0].attributions[0].spans[0].end == len("user: hello")


@pytest.mark.parametrize("said", [[], [chunk("a")]])
def test_a_call_that_stands_idle_is_ended_as_its_stream_is(said):
    config = make_config(sessions={"idle_seconds": 0.3})
    with running(config, StandIn(config)) as server, grpc.insecure_channel(server.address) as channel:
        over = threading.Event()

        def requests():
            yield from said
            over.wait(20)

        answers = guard_pb2_grpc.GuardServiceStub(channel).Watch(requests(), timeout=10)
        seen = []
        with pytest.raises(grpc.RpcError) as caught:
            seen.extend(answers)
        over.set()
        assert caught.value.code() is grpc.StatusCode.ABORTED
        assert caught.value.details() == "the stream stood idle for more than 0.3 s and was closed"


def test_a_stream_without_chunks_ends_without_verdicts(client, standin):
    assert list(client.watch([])) == []
    assert closed(standin)


@pytest.mark.parametrize(
    ("second", "message", "reason"),
    [
        (
            pb.WatchRequest(start=pb.WatchRequest.Start()),
            "chunk 1: found start, expected chunk or chat (start comes once, and first)",
            "UNEXPECTED_MESSAGE",
        ),
        (
            pb.WatchRequest(),
            "chunk 1: found an empty message, expected chunk or chat (start comes once, and first)",
            "UNEXPECTED_MESSAGE",
        ),
        (
            chunk("x", phase=0),
            "chunk 1: found phase 0, expected PHASE_PROMPT or PHASE_COMPLETION",
            "UNKNOWN_PHASE",
        ),
        (
            chunk("x", phase=8),
            "chunk 1: found phase 8, expected PHASE_PROMPT or PHASE_COMPLETION",
            "UNKNOWN_PHASE",
        ),
        (
            pb.WatchRequest(chat=pb.Chat(messages=[pb.Message(content="x")])),
            "message 0: found no role, expected one of system, user, assistant",
            "UNKNOWN_ROLE",
        ),
    ],
)
def test_a_wrong_message_ends_the_stream_and_is_named(stub, standin, second, message, reason):
    responses = stub.Watch(iter([chunk("a"), second]))
    assert next(responses).sequence == 0
    with pytest.raises(grpc.RpcError) as seen:
        next(responses)
    assert seen.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert seen.value.details() == message
    assert reason.encode() in dict(seen.value.trailing_metadata())["grpc-status-details-bin"]
    assert closed(standin)


def test_bytes_that_are_no_message_end_the_stream(server, standin):
    with grpc.insecure_channel(server.address) as channel:
        watch = channel.stream_stream("/guard.v1.GuardService/Watch")
        with pytest.raises(grpc.RpcError) as seen:
            list(watch(iter([chunk("a").SerializeToString(), b"\x12\x04\x12\x02\xff\xfe"])))
    assert seen.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "guard.v1.WatchRequest" in seen.value.details()
    assert closed(standin)


@pytest.mark.parametrize("error", [Exhausted("too many streams", retry_after_s=1), SessionExpired("stood idle")])
def test_an_error_of_the_stream_keeps_its_kind(client, standin, error):
    standin.error = error
    with pytest.raises(type(error), match=f"^{error}$"):
        list(client.watch([Chunk(Phase.PROMPT, "a")]))
    assert closed(standin)


def test_an_error_in_the_middle_ends_the_stream(client, standin):
    verdicts = client.watch([Chunk(Phase.PROMPT, "a"), Chunk(Phase.PROMPT, "")])
    assert next(verdicts).action == "allow"
    with pytest.raises(InvalidInput, match=r"^prompt: found an empty text, expected text$"):
        next(verdicts)
    assert closed(standin)


def test_a_caller_that_stops_early_frees_the_stream(client, standin):
    verdicts = client.watch(Chunk(Phase.COMPLETION, f"{n} ") for n in range(1_000_000))
    next(verdicts)
    assert standin.open_sessions == 1
    verdicts.close()
    assert closed(standin)


def test_a_deadline_frees_the_stream_and_its_chunk(server, standin):
    with GuardClient(server.address) as client, pytest.raises(Exception, match="Deadline"):
        list(client.watch([Chunk(Phase.PROMPT, "never")], timeout_s=0.2))
    assert closed(standin)
    assert standin.futures[0].cancelled()


def test_what_the_callers_chunks_raise_is_raised_to_the_caller(client, standin):
    def chunks():
        yield Chunk(Phase.PROMPT, "a")
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        list(client.watch(chunks()))
    assert closed(standin)
