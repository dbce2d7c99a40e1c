"""Settings from a file and from the environment: what counts, and what is refused by name."""

import re
from pathlib import Path

import pytest

from guard import config
from guard.config import load_config
from guard.errors import ConfigError
from tests.conftest import PACK


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("0.0.0.0:50051", ("0.0.0.0:50051",)),
        ("[::1]:50051", ("[::1]:50051",)),
        ('["127.0.0.1:1", "unix:/run/guard.sock"]', ("127.0.0.1:1", "unix:/run/guard.sock")),
    ],
)
def test_addresses_from_the_environment(monkeypatch, text, addresses):
    monkeypatch.setenv("GUARD_SERVER__LISTEN", text)
    assert load_config().server.listen == addresses


def test_a_section_and_one_setting_of_it_go_together(monkeypatch):
    monkeypatch.setenv("GUARD_READER__DTYPE", "bfloat16")
    monkeypatch.setenv("GUARD_READER", '{"window": 64, "dtype": "float32"}')
    reader = load_config().reader
    assert (reader.window, reader.dtype) == (64, "bfloat16")


def test_an_empty_variable_is_unset_and_turns_the_metrics_off(monkeypatch):
    monkeypatch.setenv("GUARD_READER__DTYPE", "")
    monkeypatch.setenv("GUARD_SERVER__METRICS", "")
    found = load_config()
    assert (found.reader.dtype, found.server.metrics) == ("float32", "")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("GUARD_REEDER__DTYPE", "bfloat16", "unknown key 'reeder'; did you mean 'reader'?"),
        ("GUARD_SERVER__METRIC", "", "unknown key 'server.metric'; did you mean 'metrics'?"),
        ("GUARD_SERVER__PORT", "50052", "unknown key 'server.port'; expected one of: listen, metrics, "),
        ("GUARD_READER__DTYPE", "int8", "reader.dtype: found 'int8': Input should be 'float32', 'bfloat16' or 'auto'"),
        ("GUARD_SERVER__LISTEN", "[]", "server.listen: found []: Tuple should have at least 1 item"),
        ("GUARD_READER__THREADS", "true", "reader.threads: found 'true': Input should be a valid integer"),
    ],
)
def test_a_variable_that_is_wrong_is_named(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"^environment variable {name}: {re.escape(message)}"):
        load_config()


def test_what_kubernetes_sets_for_a_service_named_guard_is_left_alone(monkeypatch):
    before = load_config()
    for name, value in {
        "GUARD_SERVICE_HOST": "10.0.0.11",
        "GUARD_SERVICE_PORT": "50051",
        "GUARD_SERVICE_PORT_GRPC": "50051",
        "GUARD_PORT": "tcp://10.0.0.11:50051",
        "GUARD_PORT_50051_TCP": "tcp://10.0.0.11:50051",
        "GUARD_PORT_50051_TCP_ADDR": "10.0.0.11",
        "GUARD_SIDECAR_SERVICE_HOST": "10.0.0.12",
    }.items():
        monkeypatch.setenv(name, value)
    assert load_config() == before


def test_a_file_that_is_not_utf8_is_named_and_a_byte_order_mark_is_none_of_the_text(tmp_path):
    file = tmp_path / "guard.toml"
    file.write_bytes(b'[reader]\nmodel = "caf\xe9"\n')
    with pytest.raises(ConfigError, match=rf"^config {file}: is not valid UTF-8: byte 0xe9 at offset 21$"):
        load_config(file)
    file.write_bytes(b"\xef\xbb\xbf[reader]\nwindow = 64\n")
    assert load_config(file).reader.window == 64


def test_the_shipped_pack_is_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_config().pack == PACK
    nearer = tmp_path / config.DEFAULT_PACK
    nearer.mkdir(parents=True)
    assert load_config().pack.resolve() == nearer


def test_a_pack_that_was_named_is_not_looked_for_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GUARD_PACK", str(config.DEFAULT_PACK))
    assert load_config().pack == Path(config.DEFAULT_PACK)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sessions.limit = true", "sessions.limit: found True: Input should be a number, not a boolean"),
        ("taps.idle_seconds = true", "taps.idle_seconds: found True: Input should be a number, not a boolean"),
        (
            'policy.thresholds."violence.harm" = {block = true}',
            "policy.thresholds.violence.harm.block: found True: Input should be a number, not a boolean",
        ),
        (
            "reader.allow_unverified = 1",
            "reader.allow_unverified: found 1: Input should be true or false, not a number",
        ),
    ],
)
def test_a_boolean_is_no_number_and_a_number_no_boolean(tmp_path, line, message):
    file = tmp_path / "guard.toml"
    file.write_text(line)
    with pytest.raises(ConfigError) as raised:
        load_config(file)
    assert str(raised.value) == f"config {file}: {message}"
