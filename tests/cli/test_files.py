"""What needs a pack's files only: features, packs, settings."""

import json
import tomllib

import pytest

from guard.cli.config import as_toml
from guard.cli.options import settings
from guard.config import GuardConfig, load_config
from tests.cli.given import make_pack


def test_features_as_a_table(guard, toy):
    found = guard("features", "--pack", toy)
    assert found.status == 0
    lines = [line.split() for line in found.out.splitlines()]
    assert lines[0] == ["latent", "domains", "name", "r", "rate", "top", "weight"]
    assert lines[2] == ["model.layers.2/3", "violence,", "weapons", "knives", "1.250%", "-1.50", "violence.harm"]
    assert lines[3][:2] == ["model.layers.2/9", "violence,"]
    assert lines[4][:3] == ["model.layers.2/40", "(no", "name)"]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["--domain", "terror"], [9]),
        (["--subdomain", "weapons"], [3]),
        (["--hook-point", "model.layers.2", "--limit", "2"], [3, 9]),
        (["--search", "KNIV"], [3]),
        (["--search", "刀"], [3]),
        (["--search", "nowhere"], []),
        (["--limit", "0"], [3, 9, 40]),
    ],
)
def test_features_filtered(guard, toy, filters, expected):
    found = guard("features", "list", "--pack", toy, "--json", *filters)
    assert [f["latent"]["index"] for f in json.loads(found.out)] == expected


def test_features_say_when_some_are_not_shown(guard, toy):
    assert guard("features", "--pack", toy, "--limit", "1").err == "1 of 3; --limit 0 shows all\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domain", "nope"], "unknown domain 'nope', expected one of: terror, violence"),
        (["--subdomain", "nope"], "unknown subdomain 'nope', expected one of: weapons"),
        (["--hook-point", "nope"], "unknown hook point 'nope', expected one of: model.layers.2"),
        (["show", "model.layers.2/4"], "unknown latent model.layers.2/4: pack toy holds no such row"),
    ],
)
def test_features_that_are_not_there(guard, toy, arguments, message):
    found = guard("features", *arguments, "--pack", toy)
    assert (found.status, found.out, found.err) == (1, "", f"guard: error: {message}\n")


def test_one_feature(guard, toy):
    found = guard("features", "show", "model.layers.2/3", "--pack", toy)
    assert [line.rstrip() for line in found.out.splitlines()] == [
        "model.layers.2/3",
        "name         knives",
        "explanation  knives",
        "domains      violence",
        "sub-domains  weapons",
        "fires on     1.2500% of tokens, where its pre-activation is above 5",
        "scale        20",
        "scores       detection 0.750",
        "top tokens   “ knife” “刀”",
        "weight in each head",
        "  violence.harm    -1.500  ████████████████████",
        "  terror.presence  +0.500  ███████",
        "examples (peak activation, in units of its scale)",
        "   1.50  a sharp knife",
    ]


def test_the_token_that_fires_is_highlighted(guard, toy, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = guard("features", "show", "model.layers.2/3", "--pack", toy).out
    assert "\x1b[1;37;41mknife\x1b[0m" in out


def test_a_packs_words_cannot_write_to_the_terminal(guard, tmp_path):
    folder = make_pack(tmp_path / "hostile", explanation="\x1b[2J[red]x[/red]")
    for arguments in (["features"], ["features", "show", "model.layers.2/3"]):
        out = guard(*arguments, "--pack", folder).out
        assert "\x1b" not in out
        assert "[red]x[/red]" in out


def test_a_pack_shown(guard, toy):
    out = guard("pack", "show", toy).out
    for part in (
        "toy 1.0.0",
        "for the tests of the command line",
        "3, 1 explained",
        "calibrated probabilities",
        "12.5%",
        "never",
        "Apache-2.0",
    ):
        assert part in out
    told = json.loads(guard("pack", "show", toy, "--json").out)
    assert (told["manifest"]["id"], told["evaluation"], len(told["hash"])) == ("toy", {"auroc": 0.5}, 64)


def test_a_pack_with_a_changed_file_is_refused(guard, toy):
    (toy / "cases.jsonl").write_text("")
    found = guard("pack", "check", toy, "--no-replay")
    assert found.status == 1
    assert found.err.startswith(f"guard: error: {toy}/cases.jsonl: sha256: found ")


def test_settings_shown_with_what_they_mean(guard):
    out = guard("config", "show", "--set", "reader.dtype=bfloat16").out
    assert "setting" in out.splitlines()[0]
    line = next(line for line in out.splitlines() if line.startswith("reader.dtype"))
    assert '"bfloat16"' in line
    assert "float32 is exact" in line


def test_every_setting_has_a_meaning():
    lines = as_toml(GuardConfig()).splitlines()
    named = [i for i, line in enumerate(lines) if ("=" in line and not line.startswith("# ")) or line.endswith(" =")]
    assert len(named) > 15
    assert all(lines[i - 1].startswith("# ") for i in named)


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["server.metrics=", "reader.threads=2", "sessions.idle_seconds=1.5", "reader.allow_unverified=true"],
        ['server.listen=["unix:/tmp/a", "127.0.0.1:1"]', 'server.tls_key=a "b" ü.pem'],
        ['policy.thresholds."violence.harm".flag=0.25', 'policy.thresholds."violence.harm".block=0.5', "pack=x y"],
        ['policy.thresholds."violence.harm".block=never', 'policy.thresholds."terror.harm".flag=0.5'],
    ],
)
def test_toml_reads_back_the_same(guard, tmp_path, sets):
    flags = [flag for given in sets for flag in ("--set", given)]
    text = guard("config", "show", "--toml", *flags).out
    tomllib.loads(text)
    file = tmp_path / "guard.toml"
    file.write_text(text)
    assert load_config(file) == settings(None, sets)


def test_a_value_of_a_setting_is_toml_where_it_can_be():
    assert settings(None, ["policy.version=2026-01-01"]).policy.version == "2026-01-01"
    assert settings(None, ["policy.version=2.10"]).policy.version == "2.10"
    assert settings(None, ["reader.model=./a=b"]).reader.model == "./a=b"
    assert settings(None, ["reader.window=64", "reader.window=128"]).reader.window == 128
    assert settings(None, ["server.metrics=a:1"], None, listen=["b:2"], metrics=None).server.listen == ("b:2",)


def test_flags_go_over_the_environment_and_that_over_the_file(guard, tmp_path, monkeypatch):
    file = tmp_path / "guard.toml"
    file.write_text("[reader]\nwindow = 64\noverlap = 16\nthreads = 1\n")
    monkeypatch.setenv("GUARD_READER__WINDOW", "128")
    monkeypatch.setenv("GUARD_READER__OVERLAP", "32")
    text = guard("config", "show", "--toml", "--config", file, "--set", "reader.window=256").out
    reader = tomllib.loads(text)["reader"]
    assert (reader["window"], reader["overlap"], reader["threads"]) == (256, 32, 1)
