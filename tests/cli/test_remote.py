"""Commands against a running sidecar: real gRPC, an assessor without a model behind it."""

import contextlib
import json
import os
import threading
import time
from concurrent.futures import Future

import pytest

from guard.cli.backend import Remote
from guard.errors import Exhausted, Unavailable
from guard.records import CheckInput, CheckOptions
from guard.service.client import GuardClient
from tests.service.forgetful import Forgetful
from tests.service.running import make_config, running
from tests.service.standin import StandIn
from tests.service.test_server import write_pair


@pytest.fixture
def address():
    config = make_config(limits={"text_bytes": 1000})
    with running(config, StandIn(config)) as found:
        yield found.address


@contextlib.contextmanager
def remote(standin, **client):
    with running(standin.config, standin) as server, GuardClient(server.address, **client) as found:
        answers = Remote(found, make_config())
        try:
            yield answers
        finally:
            answers.close()


def test_a_row_that_a_full_sidecar_refuses_waits_no_longer_than_the_deadline():
    class Full(StandIn):
        def submit(self, given, options=None):
            raise Exhausted("the reader's queue is full (1 requests)", retry_after_s=0.4, reason="QUEUE_FULL")

    with remote(Full(make_config()), timeout_s=0.7) as answers:
        started = time.monotonic()
        with pytest.raises(Unavailable, match=r"^no answer within 0\.7 s: the reader's queue is full") as caught:
            answers.submit(CheckInput("x"), CheckOptions()).result(5)
        assert (caught.value.reason, time.monotonic() - started < 2) == ("DEADLINE_EXCEEDED", True)


def test_closing_does_not_wait_for_a_sidecar_that_hangs():
    class Hanging(StandIn):
        def submit(self, given, options=None):
            return Future()

    with remote(Hanging(make_config(server={"grace_seconds": 0})), timeout_s=None) as answers:
        under_way = answers.submit(CheckInput("x"), CheckOptions())
        time.sleep(0.3)
        started = time.monotonic()
        answers.close()
        assert time.monotonic() - started < 5
    with pytest.raises(Exception, match=r".+"):
        under_way.result(5)


@pytest.mark.parametrize(("text", "status"), [("hello", 0), ("block me", 11)])
def test_the_action_is_the_exit_status(guard, address, text, status):
    found = guard("check", "--address", address, text)
    assert (found.status, found.err) == (status, "")
    assert text in found.out
    assert ("BLOCK" in found.out) == (status == 11)


@pytest.mark.parametrize("arguments", [["-"], []])
def test_text_from_stdin_loses_the_line_end_of_the_shell_only(guard, address, arguments):
    found = guard("check", "--address", address, "--json", "--tokens", *arguments, stdin=b" block\nme \n")
    assert found.status == 11
    tokens = json.loads(found.out)["phases"][0]["tokens"]
    assert tokens[0]["end"] == len(" block\nme ")


def test_json_has_the_shape_of_the_api(guard, address):
    found = guard("check", "--address", address, "--json", "block 朋友")
    told = json.loads(found.out)
    assert found.out.count("\n") == 1
    assert (told["action"], told["pack"]["id"]) == ("ACTION_BLOCK", "stand-in")
    head = told["phases"][0]["domains"][0]["heads"][0]
    assert (head["head"], head["score"], head["flag_at"]) == ("HEAD_KIND_HARM", 0.875, 0.5)


def test_a_chat_and_its_completion(guard, address, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text(json.dumps([{"role": "user", "content": "block this", "name": "ignored"}]))
    assert guard("check", "--address", address, "--chat", file, "--completion", "no").status == 11


def test_a_chat_may_begin_with_a_byte_order_mark(guard, address, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text(json.dumps([{"role": "user", "content": "block this"}]), encoding="utf-8-sig")
    assert guard("check", "--address", address, "--chat", file).status == 11


class Answers(StandIn):
    """Judges the completion where there is no prompt."""

    def submit(self, given, options=None):
        return super().submit(given if given.prompt else CheckInput(given.completion), options)


@pytest.mark.timeout(60)
def test_beside_a_completion_stdin_is_read_only_where_it_is_asked_for(guard):
    config = make_config()
    with running(config, Answers(config)) as server:

        def check(*arguments, piped):
            """The pipe stays open, as a script's own may."""
            end, begin = os.pipe()
            os.write(begin, piped)
            with open(end, "rb") as stdin:  # noqa: PTH123 - a descriptor
                found = guard("check", "--address", server.address, *arguments, "--completion", "fine", stdin=stdin)
            os.close(begin)
            return found.status, found.err

        note = "guard: judging the completion alone; `-` reads the prompt from stdin, which holds text\n"
        assert check(piped=b"block this") == (0, note)
        assert check(piped=b"") == (0, "")
        asked = guard("check", "--address", server.address, "-", "--completion", "fine", stdin=b"block this")
        assert (asked.status, asked.err) == (11, "")


def test_a_stream_that_was_blocked_once_ends_with_11(guard):
    config = make_config()
    with running(config, Forgetful(config)) as server:
        found = guard("watch", "--address", server.address, stdin=b"block this\nand then nothing more\n")
    assert [line.split()[0] for line in found.out.splitlines()] == ["BLOCK", "ALLOW", "ALLOW"]
    assert found.status == 11


def test_a_sidecar_behind_mutual_tls(guard, tmp_path):
    authority = write_pair(tmp_path, "ca", authority=True)
    for name in ("server", "caller"):
        write_pair(tmp_path, name, authority)
    tls = {"tls_certificate": tmp_path / "server.pem", "tls_key": tmp_path / "server.key"}
    config = make_config(server={"listen": ["localhost:0"], "tls_client_ca": tmp_path / "ca.pem", **tls})
    own = ["--tls-ca", tmp_path / "ca.pem", "--tls-cert", tmp_path / "caller.pem", "--tls-key", tmp_path / "caller.key"]
    with running(config, Forgetful(config)) as server:
        at = ["--address", server.address, *own]
        assert guard("check", *at, "block this").status == 11
        assert guard("watch", *at, stdin=b"block this").status == 11
        assert "model.layers.3/7" in guard("features", *at).out
        assert "model.layers.3/7" in guard("features", "show", *at, "model.layers.3/7").out
        without = guard("check", "--address", server.address, "--timeout", "5", "hello")
        assert (without.status, without.out) == (1, "")


def test_errors_of_the_sidecar_arrive_whole(guard, address):
    found = guard("check", "--address", address, "")
    assert (found.status, found.err) == (1, "guard: error: prompt: found an empty text, expected text\n")
    found = guard("check", "--address", address, "a\ud800")
    assert found.err == "guard: error: text is not valid Unicode: lone surrogate U+D800 at character 1\n"


def test_a_file_of_rows(guard, address, tmp_path):
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": i, "text": "block" if i % 3 == 0 else "sleep 0.01"} for i in range(100)]
    file.write_text("\n".join(map(json.dumps, lines)))
    found = guard("check", "--address", address, "--file", file, "--out", out)
    assert (found.status, found.out) == (0, "")
    told = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in told] == list(range(100))
    assert [line["action"] for line in told] == ["ACTION_BLOCK" if i % 3 == 0 else "ACTION_ALLOW" for i in range(100)]
    assert found.err.splitlines()[-1] == "check: 100 rows: 66 allow, 34 block"


def test_a_file_with_a_bad_row_ends_with_12(guard, address):
    rows = b'{"id": "a", "text": "x"}\n{"id": "b", "text": "\\ud800"}\n{"id": "c", "text": "' + b"y" * 1001 + b'"}\n'
    found = guard("check", "--address", address, "--file", "-", stdin=rows)
    assert found.status == 12
    told = [json.loads(line) for line in found.out.splitlines()]
    assert [(line["id"], line["action"]) for line in told] == [
        ("a", "ACTION_ALLOW"), ("b", "ACTION_NOT_ASSESSED"), ("c", "ACTION_NOT_ASSESSED"),
    ]  # fmt: skip
    assert (
        told[1]["not_assessed"][0]["detail"]
        == "line 2: text is not valid Unicode: lone surrogate U+D800 at character 0"
    )
    assert told[2]["not_assessed"][0]["reason"] == "NOT_ASSESSED_REASON_BAD_INPUT"
    assert found.err.splitlines()[-1] == "check: 3 rows: 1 allow, 2 not assessed"


class Failing(StandIn):
    """Fails at one text, as a reader may."""

    def submit(self, given, options=None):
        if given.prompt == "fail":
            raise RuntimeError("a fault")
        return super().submit(given, options)


def test_a_row_that_fails_or_takes_too_long_is_one_row(guard, tmp_path):
    config, out = make_config(), tmp_path / "out.jsonl"  # the server of this process logs to stdout
    rows = [json.dumps({"id": text, "text": text}) for text in ("x", "fail", "never", "block")]
    with running(config, Failing(config)) as server:
        arguments = ("check", "--address", server.address, "--timeout", "4", "--file", "-", "--out", out)
        found = guard(*arguments, stdin="\n".join(rows).encode())
    told = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["id"], line["action"]) for line in told] == [
        ("x", "ACTION_ALLOW"), ("fail", "ACTION_NOT_ASSESSED"), ("never", "ACTION_NOT_ASSESSED"), ("block", "ACTION_BLOCK"),
    ]  # fmt: skip
    said = [line["not_assessed"][0] for line in told[1:3]]
    assert [line["reason"] for line in said] == ["NOT_ASSESSED_REASON_READER_FAILED"] * 2
    assert [line["detail"] for line in said] == [
        "line 2: internal error: the server's log says more", "line 3: Deadline Exceeded",
    ]  # fmt: skip
    assert (found.status, found.err.splitlines()[-1]) == (12, "check: 4 rows: 1 allow, 1 block, 2 not assessed")


def test_rows_come_from_a_named_pipe_and_verdicts_go_into_one(guard, address, tmp_path):
    source, sink = tmp_path / "rows", tmp_path / "verdicts"
    os.mkfifo(source)
    os.mkfifo(sink)
    read = []
    threads = [
        threading.Thread(target=source.write_text, args=('{"id": 1, "text": "block"}\n',), daemon=True),
        threading.Thread(target=lambda: read.append(sink.read_text()), daemon=True),
    ]
    for thread in threads:
        thread.start()
    found = guard("check", "--address", address, "--file", source, "--out", sink)
    threads[1].join(5)
    assert (found.status, json.loads(read[0])["action"]) == (0, "ACTION_BLOCK")


def test_an_empty_file_is_no_error(guard, address):
    found = guard("check", "--address", address, "--file", "-", stdin=b"")
    assert (found.status, found.out) == (0, "")
    assert found.err.splitlines()[-1] == "check: 0 rows: nothing to check"


def test_features_of_a_sidecar(guard, address):
    found = guard("features", "--address", address, "--domain", "terror", "--json")
    assert [f["latent"]["index"] for f in json.loads(found.out)] == [40000]
    assert "model.layers.3/7" in guard("features", "show", "--address", address, "model.layers.3/7").out
    found = guard("features", "show", "--address", address, "model.layers.3/8")
    assert (found.status, found.err) == (1, "guard: error: unknown latent model.layers.3/8\n")
