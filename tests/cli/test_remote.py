"""Commands against a running sidecar: real gRPC, an assessor without a model behind it."""

import json

import pytest

from tests.service.running import make_config, running
from tests.service.standin import StandIn


@pytest.fixture
def address():
    config = make_config(limits={"text_bytes": 1000})
    with running(config, StandIn(config)) as found:
        yield found.address


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
    assert told[1]["not_assessed"][0]["detail"] == "text is not valid Unicode: lone surrogate U+D800 at character 0"
    assert told[2]["not_assessed"][0]["reason"] == "NOT_ASSESSED_REASON_BAD_INPUT"
    assert found.err.splitlines()[-1] == "check: 3 rows: 1 allow, 2 not assessed"


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
