"""Where the server listens, how it says that it lives, and how it ends."""

import asyncio
import datetime as dt
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from guard.errors import ConfigError, Unavailable
from guard.records import Phase
from guard.service.client import Chunk, GuardClient
from guard.service.server import Server, run, serve
from tests.service.running import make_config, running
from tests.service.standin import StandIn

ROOT = Path(__file__).parents[2]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health(address, component):
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=component)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status


@contextmanager
def refused(config):
    """The server does not start, and says why."""
    with pytest.raises(ConfigError) as raised, running(config, StandIn(config)):
        pass
    yield str(raised.value)


# -- addresses


def test_it_listens_on_every_address(tmp_path):
    config = make_config(server={"listen": ["127.0.0.1:0", f"unix:{tmp_path}/guard.sock", "127.0.0.1:0"]})
    with running(config, StandIn(config)) as server:
        first, unix, second = server.bound.grpc
        assert first != second
        for address in (first, unix, second):
            with GuardClient(address) as client:
                assert client.check("x").action == "allow"
    assert not (tmp_path / "guard.sock").exists()


def test_a_stale_socket_is_taken_over_and_a_living_one_is_not(tmp_path):
    path = tmp_path / "guard.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    config = make_config(server={"listen": [f"unix:{path}"]})
    with running(config, StandIn(config)) as server, GuardClient(server.address) as client:
        assert client.check("x").action == "allow"
        with refused(config) as message:
            assert message == f"server.listen: unix:{path}: Address already in use"
        assert client.check("x").action == "allow"


def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with refused(make_config(server={"listen": [f"unix:{path}"]})) as message:
        assert message == f"server.listen: unix:{path}: found a file that is no socket"
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"listen": ["localhost"]}, "server.listen: found 'localhost', expected host:port or unix:/path"),
        ({"listen": ["127.0.0.1:70000"]}, "server.listen: found '127.0.0.1:70000', expected host:port or unix:/path"),
        ({"listen": ["unix:/no/such/guard.sock"]}, "server.listen: unix:/no/such/guard.sock: no such folder: /no/such"),
        ({"listen": ["192.0.2.1:50051"]}, "server.listen: 192.0.2.1:50051: Cannot assign requested address"),
        ({"metrics": "9464"}, "server.metrics: found '9464', expected host:port"),
        ({"metrics": "192.0.2.1:9464"}, "server.metrics: 192.0.2.1:9464: Cannot assign requested address"),
    ],
)
def test_an_address_that_cannot_be_had_is_named(server, message):
    with refused(make_config(server=server)) as found:
        assert found == message


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with refused(make_config(server={"listen": [address]})) as message:
            assert message == f"server.listen: {address}: Address already in use"
        with refused(make_config(server={"metrics": address})) as message:
            assert message == f"server.metrics: {address}: Address already in use"


@pytest.mark.parametrize("key", ["listen", "metrics"])
def test_a_port_in_use_is_told_before_a_model_is_loaded_and_in_our_words_only(key, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = make_config(server={key: [address] if key == "listen" else address}, pack="no such pack")
        with pytest.raises(ConfigError) as raised:
            run(config)
    assert str(raised.value) == f"server.{key}: {address}: Address already in use"
    assert capfd.readouterr().err == ""


def test_an_address_that_is_none_is_told_before_a_model_is_loaded(tmp_path):
    for server, message in (
        ({"listen": ["127.0.0.1:70000"]}, "server.listen: found '127.0.0.1:70000', expected host:port or unix:/path"),
        ({"tls_client_ca": tmp_path / "ca.pem"}, "server.tls_certificate: found none, expected a PEM file, as"),
    ):
        with pytest.raises(ConfigError) as raised:
            run(make_config(server=server, pack="no such pack"))
        assert str(raised.value).startswith(message)


def test_two_servers_never_share_a_port(server):
    config = make_config(server={"listen": [server.address]})
    with refused(config) as message:
        assert message == f"server.listen: {server.address}: Address already in use"


def test_metrics_can_be_turned_off():
    config = make_config(server={"metrics": ""})
    with running(config, StandIn(config)) as server:
        assert server.bound.metrics == ""


# -- TLS


def write_pair(folder, name, issuer=None, *, authority=False):
    """A key and a certificate, signed by `issuer` (its key and certificate) or by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[1].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    certificate = builder.sign(issuer[0] if issuer else key, hashes.SHA256())
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return key, certificate


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pki")
    authority = write_pair(folder, "ca", authority=True)
    for name in ("server", "caller"):
        write_pair(folder, name, authority)
    write_pair(folder, "stranger")
    (folder / "empty.pem").touch()
    (folder / "named.pem").write_bytes("# Autorität\n".encode() + (folder / "ca.pem").read_bytes())
    return folder


def tls(pki, **more):
    return {"listen": ["localhost:0"], "tls_certificate": pki / "server.pem", "tls_key": pki / "server.key"} | more


def test_tls(pki):
    config = make_config(server=tls(pki))
    with running(config, StandIn(config)) as server:
        with GuardClient(server.address, tls_ca=pki / "ca.pem") as client:
            assert client.check("x").action == "allow"
        for wrong in ({"tls_ca": pki / "stranger.pem"}, {}):
            with GuardClient(server.address, timeout_s=5, **wrong) as client, pytest.raises(Unavailable):
                client.check("x")


@pytest.mark.parametrize("authority", ["ca.pem", "named.pem"])  # one with a comment that is not ASCII
def test_mutual_tls(pki, authority):
    config = make_config(server=tls(pki, tls_client_ca=pki / authority))
    own = {"tls_certificate": pki / "caller.pem", "tls_key": pki / "caller.key"}
    other = {"tls_certificate": pki / "stranger.pem", "tls_key": pki / "stranger.key"}
    with running(config, StandIn(config)) as server:
        with GuardClient(server.address, tls_ca=pki / "ca.pem", **own) as client:
            assert client.check("x").action == "allow"
        for wrong in (other, {}):
            with (
                GuardClient(server.address, timeout_s=5, tls_ca=pki / "ca.pem", **wrong) as client,
                pytest.raises(Unavailable),
            ):
                client.check("x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tls_key": None}, "server.tls_key: found none, expected a PEM file, as server.tls_certificate is set"),
        (
            {"tls_certificate": None},
            "server.tls_certificate: found none, expected a PEM file, as server.tls_key is set",
        ),
        ({"tls_key": "absent.key"}, "server.tls_key: {}/absent.key: No such file or directory"),
        ({"tls_certificate": "."}, "server.tls_certificate: {}: Is a directory"),
        (
            {"tls_key": "caller.key"},
            (
                "server.tls_certificate {0}/server.pem, server.tls_key {0}/caller.key: "
                "found no pair of PEM certificate and unencrypted key: KEY_VALUES_MISMATCH"
            ),
        ),
        ({"tls_client_ca": "ca.key"}, "server.tls_client_ca: {}/ca.key: found no PEM certificate"),
        ({"tls_client_ca": "empty.pem"}, "server.tls_client_ca: {}/empty.pem: found no PEM certificate"),
    ],
)
def test_tls_files_that_cannot_be_used_are_named(pki, change, message):
    given = {key: file and pki / file for key, file in change.items()}
    with refused(make_config(server=tls(pki, **given))) as found:
        assert found == message.format(pki)


def test_a_client_authority_alone_is_refused(pki):
    with refused(make_config(server={"tls_client_ca": pki / "ca.pem"})) as found:
        assert found == "server.tls_certificate: found none, expected a PEM file, as server.tls_client_ca is set"


# -- health and reflection


def test_health_names_its_components(server):
    for component in ("", "guard.v1.GuardService", "liveness", "readiness"):
        assert health(server.address, component) == SERVING
    with pytest.raises(grpc.RpcError) as seen:
        health(server.address, "other")
    assert seen.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_describes_the_service(server):
    with grpc.insecure_channel(server.address) as channel:
        reflected = ProtoReflectionDescriptorDatabase(channel)
        assert set(reflected.get_services()) >= {"guard.v1.GuardService", "grpc.health.v1.Health"}
        service = DescriptorPool(reflected).FindServiceByName("guard.v1.GuardService")
    assert [method.name for method in service.methods] == [
        "Check",
        "Watch",
        "Follow",
        "ListFeatures",
        "GetFeature",
        "GetPack",
    ]


def test_a_health_watch_hears_of_the_end_and_does_not_hold_it_up():
    config = make_config(server={"grace_seconds": 30})
    seen = []

    def watch(address):
        with grpc.insecure_channel(address) as channel:
            stream = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
            seen.extend(answer.status for answer in stream)

    with running(config, StandIn(config)) as server:
        watcher = threading.Thread(target=watch, args=(server.address,))
        watcher.start()
        while not seen and watcher.is_alive():
            time.sleep(0.01)
        started = time.monotonic()
    watcher.join(5)
    assert seen == [SERVING, NOT_SERVING]
    assert time.monotonic() - started < 5


# -- the end


def test_a_stopped_server_lets_go_of_everything():
    standin = StandIn(make_config())
    observer = standin.observer
    with running(standin.config, standin) as server:
        assert standin.observer is server.server.metrics
    assert standin.observer is observer
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://{server.bound.metrics}/metrics", timeout=5)
    again = make_config(server={"listen": [server.address], "metrics": server.bound.metrics})
    with running(again, StandIn(again)) as second:
        assert second.address == server.address


def test_a_call_that_outlasts_the_grace_is_ended():
    config = make_config(server={"grace_seconds": 0.2})
    raised = []

    def ask(address):
        with GuardClient(address) as client:
            try:
                client.check("never")
            except Unavailable as error:
                raised.append(error)

    standin = StandIn(config)
    with running(config, standin) as server:
        caller = threading.Thread(target=ask, args=(server.address,))
        caller.start()
        while not standin.futures and caller.is_alive():
            time.sleep(0.01)
        started = time.monotonic()
    caller.join(5)
    assert len(raised) == 1
    assert 0.15 < time.monotonic() - started < 3
    assert standin.futures[0].cancelled()


async def test_serve_closes_the_assessor_also_when_it_cannot_start():
    standin = StandIn(make_config())
    end = asyncio.Event()
    await serve(standin.config, standin, ready=lambda _: end.set(), until=end)
    assert standin.closed
    broken = StandIn(make_config(server={"listen": ["nowhere"]}))
    with pytest.raises(ConfigError, match="expected host:port"):
        await serve(broken.config, broken)
    assert broken.closed


async def test_a_server_that_never_started_can_be_stopped():
    standin = StandIn(make_config())
    await Server(standin.config, standin).stop(grace_seconds=0)


@contextmanager
def process(address="127.0.0.1:0"):
    command = [sys.executable, "-m", "tests.service.standin", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ) as child:
        try:
            yield child, child.stdout.readline().strip()
        finally:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_the_process(number):
    with process() as (child, address):
        verdicts = []

        def ask():
            with GuardClient(address) as client:
                verdicts.append(client.check("sleep 2"))

        caller = threading.Thread(target=ask)
        caller.start()
        time.sleep(0.5)
        child.send_signal(number)
        time.sleep(0.3)
        for component, status in (("readiness", NOT_SERVING), ("", NOT_SERVING), ("liveness", SERVING)):
            assert health(address, component) == status
        caller.join(10)
        assert verdicts[0].action == "allow"
        assert child.wait(10) == 0
        assert child.stdout.read().strip() == "closed"


def answered(client, seconds):
    """The first answer of a client that was cut off: it connects again by itself."""
    ends = time.monotonic() + seconds
    while True:
        try:
            return client.check("x")
        except Unavailable:
            if time.monotonic() > ends:
                raise
            time.sleep(0.05)


def test_callers_of_a_killed_server_see_unavailable_and_the_next_one_serves(tmp_path):
    address = f"unix:{tmp_path}/guard.sock"  # a killed server leaves its socket behind
    with GuardClient(address, timeout_s=5) as client:
        with process(address) as (child, _):
            verdicts = client.watch(iter([Chunk(Phase.PROMPT, "a"), Chunk(Phase.PROMPT, "never")]))
            assert next(verdicts).action == "allow"
            child.kill()
            child.wait(5)
            with pytest.raises(Unavailable):
                next(verdicts)
            with pytest.raises(Unavailable):
                client.check("x")
        with process(address):
            with GuardClient(address, timeout_s=5) as other:
                assert other.check("x").action == "allow"
            assert answered(client, seconds=5).action == "allow"
