"""Taps and followers over gRPC, with the real reader's hits: what arrives, what is lost, and what is said about it."""

import contextlib
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from guard.errors import InvalidInput, NotFound, Unavailable
from guard.records import Action, CheckOptions
from guard.service import wire
from guard.service.client import GuardClient
from guard.service.pb.guard.v1 import tap_pb2 as pb
from guard.service.sink import GrpcSink
from guard.tap.protocol import Missed, Step
from tests.assessor.given import scores
from tests.service.running import make_config, running
from tests.tap.given import BLOCKED, HARMLESS, asked, info_of, observed_by, told


@pytest.fixture
def address(tmp_path):
    return f"unix:{tmp_path}/taps.sock"


@pytest.fixture
def serving(assessor, address):
    """Starts a sidecar over the assessor that is loaded already: requests of its own, short times."""

    def start(**taps):
        config = make_config(server={"taps": address}, taps={"wait_seconds": 0.5} | taps)
        assessor.observed = observed_by(assessor, **config.taps.model_dump())
        assessor.config = config
        return running(config, assessor)

    before = assessor.config, assessor.observed
    yield start
    assessor.config, assessor.observed = before


@pytest.fixture
def server(serving):
    with serving() as found:
        yield found


@pytest.fixture
def client(server):
    with GuardClient(server.address, timeout_s=20) as found:
        yield found


@pytest.fixture
def sink(assessor, server, address):
    made = GrpcSink(address, info_of(assessor))
    yield made
    made.close()


def until(what, seconds=10.0):
    ends = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < ends:
        time.sleep(0.01)
    return found


def health(server):
    with grpc.insecure_channel(server.address) as channel:
        asked_for = health_pb2.HealthCheckRequest(service="taps")
        return health_pb2_grpc.HealthStub(channel).Check(asked_for, timeout=5).status


def serves(server):
    return health(server) == health_pb2.HealthCheckResponse.SERVING


def told_whole(sink, request, step=1):
    sink.send(request.step(0, request.prompt_tokens))
    for begin in range(request.prompt_tokens, len(request.ids), step):
        sink.send(request.step(begin, min(begin + step, len(request.ids))))
    sink.send(request.ended())


def outcome(client, request_id):
    return list(client.follow(request_id))[-1]


def test_a_followed_request_is_told_as_it_goes_and_ends_as_reader_mode_does(assessor, client, sink):
    given = asked(HARMLESS, "Let it rest 🙂, and then cut it into slices.")
    request = told(assessor, given, "f-1")
    seen = []
    follower = threading.Thread(target=lambda: seen.extend(client.follow("f-1")))
    follower.start()
    told_whole(sink, request)
    follower.join(20)
    last = seen[-1]
    wanted = assessor.check(given)
    assert scores(last.verdict) == pytest.approx(scores(wanted), abs=1e-4)
    assert (last.verdict.request_id, last.verdict.action, last.finish_reason) == ("f-1", wanted.action, "stop")
    assert (last.prompt_read, last.completion_read) == (request.prompt_tokens, len(request.ids) - request.prompt_tokens)
    assert [s.completion_read for s in seen] == sorted(s.completion_read for s in seen)
    assert seen[0].verdict is not None
    assert scores(outcome(client, "f-1").verdict) == scores(last.verdict)  # also for whom comes late


def test_a_block_reaches_the_tap_and_the_follower(assessor, client, sink):
    request = told(assessor, asked(BLOCKED, "No."), "f-2")
    sink.send(request.step(0, request.prompt_tokens))
    assert until(sink.stops) == {"f-2"}
    assert next(iter(client.follow("f-2"))).verdict.action is Action.BLOCK
    sink.send(request.ended("guard", tokens=request.prompt_tokens))
    assert not sink.stops()
    assert (outcome(client, "f-2").finish_reason, outcome(client, "f-2").verdict.action) == ("guard", "block")


def test_an_announced_request_without_rows_is_not_assessed_and_health_says_so(assessor, client, server, sink):
    assert serves(server)
    last = outcome(client, "never")
    assert (last.finish_reason, last.verdict.action) == ("no_rows", "not_assessed")
    assert (
        last.verdict.not_assessed[0].detail
        == "no tap has brought rows of this request within 0.5 s (taps.wait_seconds)"
    )
    assert until(lambda: not serves(server))
    request = told(assessor, asked(HARMLESS), "comes")
    follower = threading.Thread(target=lambda: outcome(client, "comes"))
    follower.start()
    assert until(lambda: "comes" in assessor.observed._announced)
    told_whole(sink, request)
    follower.join(20)
    assert until(lambda: serves(server))


def test_while_rows_of_others_come_one_that_waits_is_no_trouble_of_the_taps(assessor, client, server, sink):
    assert until(lambda: sink.connected)
    seen = []
    follower = threading.Thread(target=lambda: seen.append(outcome(client, "waits")))
    follower.start()
    assert until(lambda: "waits" in assessor.observed._announced)
    sink.send(told(assessor, asked(HARMLESS), "runs").step(0, 20))
    follower.join(20)
    assert seen[0].verdict.action is Action.NOT_ASSESSED
    assert serves(server)


def test_a_request_to_come_is_not_the_one_of_its_id_that_has_ended(assessor, client, sink):
    first, second = (told(assessor, asked(given), "again") for given in (BLOCKED, HARMLESS))
    told_whole(sink, first)
    assert outcome(client, "again").verdict.action is Action.BLOCK
    stream = client.follow("again", upcoming=True)  # the sidecar waits for it when this returns
    told_whole(sink, second)
    assert until(lambda: assessor.observed.find("again").finish_reason)
    seen = list(stream)
    assert (seen[-1].finish_reason, seen[-1].verdict.action) == ("stop", "allow")


def test_a_request_that_nobody_waits_for_is_not_to_be_sent(client):
    with pytest.raises(NotFound, match="weather"):
        client.follow("a", upcoming=True, options=CheckOptions(domains=("weather",)))
    with GuardClient("127.0.0.1:1") as nobody, pytest.raises(Unavailable):
        nobody.follow("a", upcoming=True)


def test_a_prompt_that_comes_in_parts_is_not_judged_before_it_is_whole(assessor, client, sink):
    request = told(assessor, asked(f"{BLOCKED} {HARMLESS * 8}"), "parts")
    assert until(lambda: sink.connected)
    sink.send(request.step(0, 40))
    stream = client.follow("parts")
    first = next(stream).verdict
    assert (first.action, [m.reason for m in first.not_assessed]) == ("not_assessed", ["too_few_read"])
    sink.send(request.step(40, len(request.ids)))
    sink.send(request.ended())
    assert list(stream)[-1].verdict.action == assessor.check(asked(f"{BLOCKED} {HARMLESS * 8}")).action


def test_a_follower_hears_the_end_of_its_request_however_soon_that_is_forgotten(assessor, serving, address):
    first, second = (told(assessor, asked(given), "twice") for given in (BLOCKED, HARMLESS))
    with serving(keep_seconds=0, sessions=1) as server, GuardClient(server.address, timeout_s=20) as client:
        sink = GrpcSink(address, info_of(assessor))
        try:
            assert until(lambda: sink.connected)
            sink.send(first.step(0, 20))
            stream = client.follow("twice", timeout_s=20)
            assert next(stream).verdict.action is Action.NOT_ASSESSED
            sink.send(first.step(20, len(first.ids)))
            sink.send(first.ended())
            told_whole(sink, second)  # another of that id: the first one's follower does not follow it
            time.sleep(1.5)  # and what has ended was let go meanwhile
            last = list(stream)[-1]
        finally:
            sink.close()
    assert (last.verdict.action, last.finish_reason) == ("block", "stop")


def test_a_request_that_stands_is_lost_though_no_tap_says_anything(assessor, serving, address):
    request = told(assessor, asked(HARMLESS), "stands")
    with serving(idle_seconds=0.5) as server, GuardClient(server.address, timeout_s=20) as client:
        sink = GrpcSink(address, info_of(assessor))
        try:
            assert until(lambda: sink.connected)
            sink.send(request.step(0, 20))
            last = list(client.follow("stands", timeout_s=20))[-1]
        finally:
            sink.close()
    assert (last.finish_reason, last.verdict.action) == ("lost", "not_assessed")
    assert last.verdict.not_assessed[0].detail == "no rows have come for 0.5 s (taps.idle_seconds)"


def test_a_follower_of_a_request_that_there_was_no_room_for_is_told_so(assessor, serving, address):
    first, second = told(assessor, asked(HARMLESS), "first"), told(assessor, asked(HARMLESS), "second")
    with serving(sessions=1, wait_seconds=2) as server, GuardClient(server.address, timeout_s=20) as client:
        sink = GrpcSink(address, info_of(assessor))
        try:
            assert until(lambda: sink.connected)
            sink.send(first.step(0, 20))
            assert next(iter(client.follow("first", timeout_s=20))).verdict
            stream = client.follow("second", timeout_s=20)
            heard = threading.Thread(target=lambda: seen.extend(stream))
            seen = []
            heard.start()
            assert until(lambda: "second" in assessor.observed._announced)
            sink.send(second.step(0, 20))
            heard.join(20)
            assert serves(server)  # the taps work
        finally:
            sink.close()
    verdict = seen[-1].verdict
    assert (seen[-1].finish_reason, verdict.action) == ("no_rows", "not_assessed")
    assert verdict.not_assessed[0].detail == "its rows were passed over: 1 other requests were open (taps.sessions)"


def test_a_stop_that_comes_back_late_does_not_meet_the_next_request_of_that_id(assessor):
    def observe(requests, _context):
        next(requests)
        yield wire.welcome_bytes(accepted=True)
        for _ in requests:
            pass

    request = told(assessor, asked(BLOCKED), "x")
    with stand_in(observe) as address:
        sink = GrpcSink(address, info_of(assessor))
        try:
            assert until(lambda: sink.connected)
            with sink._changed:  # the stop comes back when the engine has ended the request, and nobody has been told
                sink.send(request.step(0, 20))
                sink.send(request.ended("stop", tokens=20))
                sink._stops = frozenset({"x"})
            assert until(lambda: not sink._queue)
            assert until(lambda: not sink.stops())
        finally:
            sink.close()


def test_steps_that_were_dropped_are_counted_once_however_often_a_tap_connects_again(assessor):
    told_of = []

    def observe(requests, _context):
        next(requests)
        yield wire.welcome_bytes(accepted=True)
        told_of.append(wire.read_request(next(requests))[1])  # and goes

    sink = GrpcSink("127.0.0.1:1", info_of(assessor), queue_steps=50)
    for _ in range(60):
        sink.send(Step())
    assert sink.dropped == 10
    with stand_in(observe) as address:
        sink._address = address
        try:
            assert until(lambda: sink.send(Step()) or len(told_of) > 2, 30)
        finally:
            sink.close(timeout_s=0.1)
    assert 10 <= sum(told_of) <= sink.dropped


@contextlib.contextmanager
def stand_in(observe):
    """A server whose taps are answered by `observe`."""
    server = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.stream_stream_rpc_method_handler(observe)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(wire.SERVICE.full_name, {wire.METHOD: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0)


def test_bytes_that_are_no_numbers_are_refused_by_name(assessor):
    request = told(assessor, asked(HARMLESS), "x")
    sent = pb.ObserveRequest.FromString(wire.request_bytes(request.step(0, 4)))
    sent.step.rows[0].row += b"x"
    size = len(sent.step.rows[0].row)
    with pytest.raises(InvalidInput, match=f"rows of 'x': found {size} bytes of row, expected 4 of each value"):
        wire.read_request(sent.SerializeToString())


def test_what_cannot_be_followed_is_refused(client, server):
    with pytest.raises(InvalidInput, match="request_id: found none"):
        list(client.follow(""))
    with pytest.raises(InvalidInput, match="token_detail: cannot be had of a tapped request"):
        list(client.follow("x", options=CheckOptions(token_detail=True)))
    with pytest.raises(NotFound, match="unknown domain 'weather'"):
        list(client.follow("x", options=CheckOptions(domains=("weather",))))


def test_callers_cannot_reach_the_taps_service_nor_taps_the_callers(server, address):
    for where, method in ((server.address, "/guard.v1.TapService/Observe"), (address, "/guard.v1.GuardService/Check")):
        with grpc.insecure_channel(where) as channel, pytest.raises(grpc.RpcError) as seen:
            channel.unary_unary(method)(b"", timeout=5)
        assert seen.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_refused_tap_is_told_what_to_do_and_its_engine_goes_on(assessor, server, address):
    sink = GrpcSink(address, info_of(assessor, pack_hash="0" * 64))
    try:
        assert until(lambda: sink.refused).endswith("give the engine's tap and this sidecar the same pack")
        sink.send(Step())
        assert not sink.connected
        assert until(lambda: not serves(server))
    finally:
        sink.close(timeout_s=0.1)


def test_a_tap_that_breaks_leaves_its_open_requests_not_assessed(assessor, client, server, address):
    request = told(assessor, asked(HARMLESS, "It is done."), "cut")
    with capture_logs() as logged, grpc.insecure_channel(address) as channel:
        sent = [wire.request_bytes(info_of(assessor)), wire.request_bytes(request.step(0, request.prompt_tokens))]
        waiting = threading.Event()

        def requests():
            yield from sent
            waiting.wait(20)

        call = channel.stream_stream("/guard.v1.TapService/Observe", None, wire.read_response)(requests())
        assert next(call) == (True, "")
        stream = client.follow("cut")
        assert next(stream).verdict.action is Action.ALLOW
        call.cancel()
        waiting.set()
        last = list(stream)[-1]
    assert "tap failed" not in [line["event"] for line in logged]  # it went away
    assert (last.finish_reason, last.verdict.action) == ("lost", "not_assessed")
    assert [m.reason for m in last.verdict.not_assessed] == ["tap_lost"]
    assert until(lambda: not serves(server))


def test_without_a_sidecar_the_engine_goes_on_and_later_requests_are_assessed(assessor, serving, address):
    sink = GrpcSink(address, info_of(assessor), queue_steps=4)
    early, late = (
        told(assessor, asked(HARMLESS, "It is done and over."), "early"),
        told(assessor, asked(HARMLESS, "It is."), "late"),
    )
    try:
        started = time.monotonic()
        told_whole(sink, early)
        assert time.monotonic() - started < 0.5
        assert sink.dropped
        with serving() as server, GuardClient(server.address, timeout_s=20) as client:
            assert until(lambda: sink.connected)
            last = outcome(client, "early")
            assert (last.verdict.action, {m.reason for m in last.verdict.not_assessed}) == (
                "not_assessed",
                {"rows_missing"},
            )
            told_whole(sink, late, step=3)
            assert outcome(client, "late").verdict.action is Action.ALLOW
            assert outcome(client, "late").verdict.not_assessed == ()
    finally:
        sink.close()


def test_a_sidecar_that_restarts_under_load_assesses_what_begins_later(assessor, serving, address):
    sink = GrpcSink(address, info_of(assessor))
    given = asked(HARMLESS, "It is done.")
    ending, made = threading.Event(), []

    def load():
        while not ending.is_set():
            request = told(assessor, given, f"load-{len(made)}")
            made.append(request.request_id)
            told_whole(sink, request)

    engine = threading.Thread(target=load)
    try:
        with serving():
            engine.start()
            assert until(lambda: sink.connected and len(made) > 3)
        cut = len(made)
        with serving() as server, GuardClient(server.address, timeout_s=20) as client:
            assert until(lambda: sink.connected and len(made) > cut + 3, 20)
            ending.set()
            engine.join(20)
            assert outcome(client, made[-1]).verdict.not_assessed == ()
            verdicts = [outcome(client, name).verdict for name in made[cut - 2 :]]
            assert {v.action for v in verdicts} <= {Action.ALLOW, Action.NOT_ASSESSED}
            assert all(v.not_assessed for v in verdicts if v.action is Action.NOT_ASSESSED)
    finally:
        ending.set()
        engine.join(20)
        sink.close()


def test_what_passed_is_counted_by_engine(assessor, server, client, sink):
    request = told(assessor, asked(HARMLESS, "It is done."), "counted")
    told_whole(sink, request)
    outcome(client, "counted")
    sink.send(Step(missed=(Missed("gone", "dropped"),)))

    def found():
        with urllib.request.urlopen(f"http://{server.bound.metrics}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        told_of = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return told_of if told_of.get('guard_tap_requests{engine="transformers"}') == "1.0" else None

    values = until(found)
    assert values['guard_tap_connections{engine="transformers"}'] == "1.0"
    assert values['guard_tap_tokens_total{engine="transformers"}'] == f"{len(request.ids)}.0"
    rows = 1 + len(request.ids) - request.prompt_tokens
    assert values['guard_tap_rows_total{engine="transformers"}'] == f"{rows}.0"
    assert values['guard_requests_total{action="allow",method="observe",phase="completion"}'] == "1.0"


def test_the_sink_needs_no_torch():
    program = "import sys, guard.service.sink, guard.tap; print(*sorted({'torch', 'transformers', 'pydantic', 'guard.pack.loader'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.returncode) == ([], 0), done.stderr
