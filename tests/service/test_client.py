"""What the client refuses before anything is sent: a caller that catches GuardError catches this too."""

import pytest

from guard.errors import ConfigError, InvalidInput
from guard.records import CheckOptions, LatentId, Message, Phase, Role
from guard.service.client import Chunk, GuardClient
from tests.service.test_server import write_pair

SURROGATE = r"^text is not valid Unicode: lone surrogate U\+D800 at character 1$"


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.check("a\ud800"),
        lambda client: client.check("a", completion="b\ud800"),
        lambda client: client.check((Message(Role.USER, "a\ud800"),)),
        lambda client: list(client.watch([Chunk(Phase.PROMPT, "fine"), Chunk(Phase.PROMPT, "a\ud800")])),
        lambda client: list(client.features(domain="a\ud800")),
    ],
)
def test_a_lone_surrogate(client, ask):
    with pytest.raises(InvalidInput, match=SURROGATE) as raised:
        ask(client)
    assert raised.value.reason == "INVALID_UNICODE"


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        (lambda client: client.check("a", options=CheckOptions(max_attributions=-1)), "options"),
        (lambda client: list(client.watch([], options=CheckOptions(max_attributions=-1))), "options"),
        (lambda client: client.feature(LatentId("model.layers.9", -1)), "latent"),
    ],
)
def test_a_number_out_of_range(client, ask, what):
    with pytest.raises(InvalidInput, match=rf"^{what}: Value out of range: -1$") as raised:
        ask(client)
    assert raised.value.reason == "INVALID_OPTION"


def test_tls_files_that_cannot_be_used_are_named(tmp_path):
    for name in ("one", "other"):
        write_pair(tmp_path, name)
    certificate, key = tmp_path / "one.pem", tmp_path / "other.key"
    with pytest.raises(ConfigError, match=rf"^{key}: found no PEM certificate$"):
        GuardClient("127.0.0.1:1", tls_ca=key)
    with pytest.raises(ConfigError) as raised:
        GuardClient("127.0.0.1:1", tls_ca=certificate, tls_certificate=certificate, tls_key=key)
    pair = "found no pair of PEM certificate and unencrypted key: KEY_VALUES_MISMATCH"
    assert str(raised.value) == f"{certificate}, {key}: {pair}"
