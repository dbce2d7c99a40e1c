"""Exit codes and messages: what scripts and people meet when something is wrong, and help that loads nothing heavy."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from guard.cli import exits
from guard.cli.main import app

GROUPS = [[], ["features"], ["pack"], ["weights"], ["config"], ["tap"], ["lab"]]
COMMANDS = [
    ["check"],
    ["watch"],
    ["serve"],
    ["demo"],
    ["export"],
    ["features", "list"],
    ["features", "show"],
    ["pack", "check"],
    ["pack", "show"],
    ["weights", "fetch"],
    ["config", "show"],
    ["tap", "compare"],
    ["lab", "harvest"],
    ["lab", "train"],
    ["lab", "narrow"],
    ["lab", "words"],
    ["lab", "join"],
    ["lab", "contrast"],
    ["lab", "compare"],
    ["lab", "candidates"],
    ["lab", "explain"],
    ["lab", "simulate"],
    ["lab", "judge"],
    ["lab", "reopen"],
    ["lab", "fit"],
    ["lab", "evaluate"],
    ["lab", "build"],
    ["lab", "report"],
]


def test_what_is_closed_is_nobodys_and_the_status_stands():
    def run(closing):
        command = f"{shlex.quote(sys.executable)} -m guard.cli.main {closing}"
        return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)

    assert run("--version >&-").returncode == exits.ALLOW
    refused = run("check --no-such-flag 2>&-")
    assert (refused.returncode, refused.stdout) == (exits.USAGE, "")


def test_help_loads_nothing_heavy():
    program = (
        "import sys; from guard.cli.main import main\n"
        f"for command in {[*GROUPS, *COMMANDS]!r}: assert main([*command, '--help']) == 0, command\n"
        "print(*sorted({'torch', 'transformers', 'sae_lens', 'sklearn', 'grpc', 'numpy', 'google.protobuf'} & set(sys.modules)),"
        " file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_examples(guard, command):
    assert "Examples:\n" in guard(*command, "--help").out


def test_help_tells_the_exit_codes(guard):
    text = " ".join(guard("check", "--help").out.split())
    assert (
        "Exit status: 0 allow, 10 flag, 11 block, 12 not assessed, 2 usage error, 1 any other error, 130 Ctrl-C" in text
    )
    assert "With --file: 0 when every row was assessed, whatever the actions; 12 when any row was not assessed" in text


def test_every_command_is_covered_here():
    groups = [([], app), *(([group.name], group.typer_instance) for group in app.registered_groups)]
    commands = [
        [*path, command.name or command.callback.__name__]
        for path, group in groups
        for command in group.registered_commands
    ]
    assert sorted(GROUPS) == sorted(path for path, _ in groups)
    assert sorted(COMMANDS) == sorted(commands)


def test_version(guard):
    found = guard("--version")
    assert (found.status, found.err) == (0, "")
    assert found.out.startswith("guard ")


def test_no_command_shows_help_and_is_a_usage_error(guard):
    found = guard()
    assert (found.status, found.out) == (2, "")
    assert found.err.startswith("Usage: guard [OPTIONS] COMMAND")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chek"], "No such command 'chek'. Did you mean 'check'? (see 'guard --help')"),
        (["check", "--jsn", "x"], "No such option: --jsn"),
        (
            ["check", "--attributions", "-1", "x"],
            "Invalid value for '--attributions': Input should be greater than or equal to 0",
        ),
        (
            ["check", "--attributions", "101", "x"],
            "Invalid value for '--attributions': Input should be less than or equal to 100",
        ),
        (["check"], "found nothing to check: give TEXT, --chat, --completion or --file, or pipe text in"),
        (["check", "x", "--chat", "c.json"], "TEXT and --chat exclude each other: give one"),
        (["check", "x", "--file", "f.jsonl"], "TEXT and --file exclude each other: give one"),
        (["check", "--file", "f.jsonl", "--completion", "x"], "--completion and --file exclude each other"),
        (["check", "--out", "o.jsonl", "x"], "--out goes with --file only"),
        (
            ["check", "--address", "a:1", "--pack", "p", "x"],
            "--pack has no effect with --address: the sidecar has its own",
        ),
        (
            ["check", "--address", "a:1", "--set", 'policy.thresholds."violence.harm"={flag=0.1}', "x"],
            '--set policy.thresholds."violence.harm"={flag=0.1} has no effect with --address: the sidecar has its own',
        ),
        (
            ["watch", "--address", "a:1", "--config", "c.toml"],
            "--config has no effect with --address: the sidecar has its own",
        ),
        (["check", "--address", "", "x"], "--address: found '', expected HOST:PORT or unix:/PATH"),
        (["check", "--tls-ca", "ca.pem", "x"], "--tls-ca has no effect without --address"),
        (["check", "--timeout", "5", "x"], "--timeout has no effect without --address"),
        (["watch", "--address", "a:1", "--tls-cert", "c.pem"], "--tls-cert and --tls-key go together: give both"),
        (["features", "--tls-key", "k.pem"], "--tls-key has no effect without --address"),
        (["check", "--set", "reader.dtype", "x"], "--set: found 'reader.dtype', expected KEY=VALUE, such as"),
        (["check", "--set", "a b=1", "x"], "--set: found the key 'a b', expected a dotted name, such as reader.dtype"),
        (
            ["watch", "--chunk-chars", "0"],
            "Invalid value for '--chunk-chars': Input should be greater than or equal to 1",
        ),
        (["features", "show", "9"], "found '9', expected HOOK_POINT/INDEX, such as model.layers.22/4056"),
        (["features", "show", "model.layers.2/x"], "found 'model.layers.2/x', expected HOOK_POINT/INDEX, such as"),
        (["features", "--limit", "-1"], "Invalid value for '--limit': Input should be greater than or equal to 0"),
        (
            ["lab", "harvest", "--corpus", "no-such", "--hook-point", "h", "--out", "o"],
            "--corpus no-such: found no such file",
        ),
        (
            ["lab", "harvest", "--hook-point", "h", "--out", "o"],
            "found nothing to harvest: give --corpus, --labelled or --annotated",
        ),
        (
            ["lab", "harvest", "--corpus", "c", "--labelled", "l", "--hook-point", "h", "--out", "o"],
            "--corpus and --labelled exclude each other: give one",
        ),
        (
            ["lab", "harvest", "--labelled", "l", "--tokens", "9", "--hook-point", "h", "--out", "o"],
            "--tokens has no effect with --labelled",
        ),
        (
            ["lab", "harvest", "--annotated", "d", "--cap", "9", "--hook-point", "h", "--out", "o"],
            "--cap has no effect with --annotated",
        ),
        (
            ["lab", "harvest", "--corpus", "c", "--annotated", "d", "--hook-point", "h", "--out", "o"],
            "--corpus and --annotated exclude each other: give one",
        ),
        (
            ["lab", "harvest", "--labelled", "l", "--shard-tokens", "9", "--hook-point", "h", "--out", "o"],
            "--shard-tokens has no effect with --labelled",
        ),
        (
            ["lab", "harvest", "--corpus", "c", "--cap", "9", "--hook-point", "h", "--out", "o"],
            "--cap has no effect with --corpus",
        ),
        (
            ["lab", "harvest", "--corpus", "c", "--share", "wiki", "--hook-point", "h", "--out", "o"],
            "--share: found 'wiki', expected FILE=WEIGHT, such as wiki.txt.gz=2",
        ),
        (["lab", "train", "--out", "o"], "Missing option '--config'"),
        (["lab", "contrast", "--saes", "s", "--texts", "t"], "Missing option '--out'"),
        (
            ["lab", "fit", "--saes", "s", "--activations", "a", "--texts", "t", "--out", "o", "--power", "2"],
            "Invalid value for '--power': Input should be less than or equal to 1",
        ),
    ],
)
def test_a_usage_error_is_one_line_and_status_2(guard, arguments, message):
    found = guard(*arguments)
    assert (found.status, found.out) == (2, "")
    assert found.err.startswith(f"guard: error: {message}")
    assert found.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--set", "reader.dtyp=x", "x"], "config (environment and flags): unknown key 'reader.dtyp'; did you mean 'dtype'?"),
        (["check", "--set", "reader.window=4", "x"], "config (environment and flags): reader.window: found 4: Input should be greater than or equal to 16"),
        (["check", "--config", "absent.toml", "x"], "config absent.toml: No such file or directory"),
        (["check", "--address", "a:1", "--tls-ca", "absent.pem", "x"], "absent.pem: No such file or directory"),
        (["check", "--chat", "absent.json"], "absent.json: No such file or directory"),
        (["check", "--file", "absent.jsonl"], "absent.jsonl: No such file or directory"),
        (["check", "--pack", "absent", "x"], "absent/manifest.toml: found no such file, expected a pack's manifest.toml"),
        (["pack", "check", "absent"], "absent/manifest.toml: found no such file, expected a pack's manifest.toml"),
        (["pack", "show", "absent"], "absent/manifest.toml: found no such file, expected a pack's manifest.toml"),
        (["weights", "fetch", "absent"], "model 'absent': found no such folder, expected 'smollm2-135m-instruct' or a Hugging Face folder"),
        (["lab", "harvest", "--labelled", "absent", "--hook-point", "h", "--out", "o"], "absent: holds no *.jsonl, expected labelled rows"),
        (["lab", "harvest", "--annotated", "absent", "--context", "1024", "--hook-point", "h", "--out", "o"], "labelled texts absent/labelled/dev/catqa_en.jsonl: found no such file"),
        (["lab", "train", "--config", "search", "--activations", "absent", "--out", "o"], "absent: holds no harvest.json; make one with `guard lab harvest`"),
        (["lab", "train", "--config", "absent.toml", "--activations", "a", "--out", "o"], "absent.toml: found no such file, expected a suite's TOML file or one of: domain, reference, search"),
        (["lab", "contrast", "--saes", "absent", "--texts", "t", "--out", "o"], "absent: holds no report.json; train with `guard lab train` to its end"),
        (["lab", "evaluate", "--saes", "s", "--texts", "t", "--fitted", "absent"], "absent/fit.json: No such file or directory"),
        (["lab", "build", "--saes", "absent", "--texts", "t", "--fitted", "f", "--out", "o"], "absent: holds no report.json; train with `guard lab train` to its end"),
    ],
)  # fmt: skip
def test_another_error_is_one_line_and_status_1(guard, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    found = guard(*arguments)
    assert (found.status, found.out, found.err) == (1, "", f"guard: error: {message}\n")


def test_where_the_shipped_pack_is_not_installed_the_way_out_is_told(guard, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("guard.config.DEFAULT_PACK", Path("detectors/gone"))
    found = guard("features")
    assert found.status == 1
    assert found.err.endswith(
        "detectors/gone/manifest.toml: found no such file, expected a pack's manifest.toml; name a pack's folder with "
        "--pack, or with the setting pack\n"
    )


def test_the_shipped_pack_is_there_from_any_folder(guard, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = guard("features", "--limit", "1")
    assert (found.status, "model.layers." in found.out) == (0, True)


def test_a_variable_that_is_wrong_is_no_internal_error(guard, monkeypatch):
    monkeypatch.setenv("GUARD_SERVER__LISTEN", "0.0.0.0:50051")
    assert guard("config", "show").status == 0
    monkeypatch.setenv("GUARD_REEDER__DTYPE", "bfloat16")
    found = guard("config", "show")
    assert (found.status, found.err) == (
        1, "guard: error: environment variable GUARD_REEDER__DTYPE: unknown key 'reeder'; did you mean 'reader'?\n"
    )  # fmt: skip


def test_a_config_file_with_a_misspelt_key(guard, tmp_path):
    file = tmp_path / "guard.toml"
    file.write_text("[reader]\nwindw = 512\n")
    found = guard("check", "--config", file, "x")
    assert found.status == 1
    assert found.err == f"guard: error: config {file}: unknown key 'reader.windw'; did you mean 'window'?\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[", "not valid JSON: Expecting value: line 1 column 2 (char 1)"),
        (b"\xff", "is not valid UTF-8: byte 0xff at offset 0"),
        (b"{}", "found an object, expected a list of {role, content}"),
        (b"[]", "found an empty list, expected at least one message"),
        (b"[1]", "message 0: found a number, expected an object with role and content"),
        (b'[{"role": "user"}]', "message 0: found no 'content', expected role and content"),
        (b'[{"role": "user", "content": null}]', "message 0: content: found null, expected a string"),
        (b'[{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]', "message 1: role: found 'robot', expected one of system, user, assistant"),
    ],
)  # fmt: skip
def test_a_chat_that_is_none(guard, tmp_path, content, message):
    file = tmp_path / "chat.json"
    file.write_bytes(content)
    found = guard("check", "--chat", file)
    colon = "" if message.startswith("is") else ":"
    assert (found.status, found.err) == (1, f"guard: error: chat {file}{colon} {message}\n")
    assert guard("check", "--chat", "-", stdin=content).err == f"guard: error: chat (stdin){colon} {message}\n"


def test_stdin_that_is_not_utf8(guard):
    found = guard("check", "-", stdin=b"abc\xe9")
    assert (found.status, found.err) == (1, "guard: error: stdin is not valid UTF-8: byte 0xe9 at offset 3\n")


def test_out_must_not_overwrite_the_file_that_is_read(guard, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 1, "text": "x"}\n')
    found = guard("check", "--file", file, "--out", file)
    assert (found.status, found.err) == (
        2, f"guard: error: --out {file} is the file that --file reads: it would be overwritten\n"
    )  # fmt: skip
    assert file.read_text() == '{"id": 1, "text": "x"}\n'
    with file.open("rb") as stream:
        assert guard("check", "--file", "-", "--out", file, stdin=stream).err == found.err
    assert file.read_text() == '{"id": 1, "text": "x"}\n'


def test_commands_that_read_stdin_say_that_it_is_closed():
    for arguments in (["check"], ["check", "-"], ["check", "--chat", "-"]):
        program = f"import sys; sys.stdin = None; from guard.cli.main import main; sys.exit(main({arguments!r}))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (1, "guard: error: stdin is closed: nothing can be read from it\n")


def test_a_message_cannot_write_to_the_terminal(guard, tmp_path):
    found = guard("check", "--config", f"{tmp_path}/\x1b[31m\n", "x")
    assert "\x1b" not in found.err
    assert found.err.count("\n") == 1


def test_debug_shows_where(tmp_path):
    program = [sys.executable, "-m", "guard.cli.main", "check", "--config", "absent.toml", "x"]
    done = subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ, "GUARD_DEBUG": "1"})
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "guard.errors.ConfigError: config absent.toml" in done.stderr


def test_no_sidecar_there(guard, tmp_path):
    found = guard("check", "--address", f"unix:{tmp_path}/none.sock", "x")
    assert found.status == 1
    assert found.err.startswith("guard: error: failed to connect to all addresses")
    assert found.err.count("\n") == 1
