"""The command line over the real model: a small pack of random rows, and the pack that is shipped."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from guard.config import DEFAULT_PACK
from guard.pack.loader import check_model
from guard.reader import weights
from guard.service.client import GuardClient
from tests.cli.given import make_pack

ROOT = Path(__file__).parents[2]
GUARD = [sys.executable, "-m", "guard.cli.main"]


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    made_for = weights.fingerprint(weights.resolve(weights.DEFAULT_MODEL))
    return make_pack(tmp_path_factory.mktemp("packs") / "toy", **made_for, width=576)


def scores(told):
    return [h["score"] for p in told["phases"] for d in p["domains"] for h in d["heads"]]


def test_check_for_people(guard, pack):
    found = guard("check", "--pack", pack, "I will hurt you with a knife, dear 朋友 👍")
    assert found.status == 0
    lines = found.out.splitlines()
    assert lines[0].strip() == "ALLOW"
    assert any(line.strip().startswith("violence  harm") for line in lines)
    assert any("I will hurt you with a knife, dear 朋友 👍" in line for line in lines)
    assert "bias" in found.out


def test_thresholds_decide_the_exit_status(guard, pack):
    for word, status in (("flag", 10), ("block", 11)):
        limit = ["--set", f'policy.thresholds."violence.harm".{word}=0.0']
        lower = ["--set", 'policy.thresholds."violence.harm".flag=0.0']
        assert guard("check", "--pack", pack, *lower, *limit, "--json", "hello").status == status


def test_rows_of_a_file_judged_together_equal_each_alone(guard, pack, tmp_path):
    texts = [f"{'word ' * (i % 7)}number {i} 朋友" for i in range(30)]
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "\n".join(json.dumps({"id": f"r{i}", "text": t}) for i, t in enumerate(texts)) + '\n{"id": "bad"}\n'
    )
    found = guard("check", "--pack", pack, "--file", file, "--set", "reader.queue_size=8", "--domain", "violence")
    assert found.status == 12
    told = [json.loads(line) for line in found.out.splitlines()]
    assert [line["id"] for line in told] == [*(f"r{i}" for i in range(30)), "bad"]
    assert told[-1]["not_assessed"][0]["detail"] == "line 31: text: found nothing, expected a string"
    assert found.err.splitlines()[-1] == "check: 31 rows: 30 allow, 1 not assessed"
    for i in (0, 13):
        alone = json.loads(guard("check", "--pack", pack, "--json", "--domain", "violence", texts[i]).out)
        assert scores(told[i]) == pytest.approx(scores(alone), abs=1e-5)


@pytest.mark.parametrize("cut", [[], ["--chunk-chars", "5"]])
def test_the_last_verdict_of_a_stream_equals_a_check_of_the_whole(guard, pack, cut):
    text = "First line.\nI will hurt you,\nsaid the 朋友 👍"
    found = guard("watch", "--pack", pack, "--json", "--prompt", "Tell me", *cut, stdin=text.encode())
    told = [json.loads(line) for line in found.out.splitlines()]
    assert (found.status, len(told)) == (0, 2 + (-(-len(text) // 5) if cut else 3))
    whole = json.loads(guard("check", "--pack", pack, "--json", "Tell me", "--completion", text).out)
    assert scores(told[-1]) == pytest.approx(scores(whole), abs=1e-3)
    assert told[-1]["phases"][1]["tokens_read"] == told[-1]["phases"][1]["tokens_total"]


def test_a_stream_of_nothing_is_not_assessed(guard, pack):
    found = guard("watch", "--pack", pack, stdin=b"")
    assert found.status == 12
    assert found.out.startswith("NOT ASSESSED")


def test_pack_check_prints_each_case_that_fails(guard, pack):
    found = guard("pack", "check", pack)
    assert found.status == 1
    assert found.out.splitlines()[2:] == [
        "FAIL  case/2: violence: found allow, expected flag or block",
        "      I will hurt you.",
        "FAIL  cases: 1 of 2 pass",
    ]
    found = guard("pack", "check", pack, "--no-replay")
    assert found.status == 0
    assert [line[:11] for line in found.out.splitlines()] == ["ok    files", "ok    model", "skip  cases"]


def test_pack_check_refuses_another_model(guard, tmp_path):
    folder = make_pack(tmp_path / "other", width=576)
    found = guard("pack", "check", folder)
    assert found.status == 1
    assert found.err.startswith(f"guard: error: {folder}/manifest.toml: model.weights: found weights ")
    found = guard("pack", "check", folder, "--no-replay", "--set", "reader.allow_unverified=true")
    assert found.status == 0
    assert "warn  model: smollm2-135m-instruct" in found.out


def test_weights_fetch_prints_the_fingerprint(guard):
    found = guard("weights", "fetch")
    folder = weights.resolve(weights.DEFAULT_MODEL)
    assert found.out.splitlines()[0] == f"folder     {folder}"
    assert weights.fingerprint(folder)["weights"] in found.out


@contextmanager
def started(*arguments, until):
    """A `guard` process that has printed `until`; killed at the end where it still runs."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*GUARD, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if until in line:
                break
        else:
            pytest.fail(f"ended before it said {until!r}: {process.stderr.read()}")
        yield process, "".join(lines)
    finally:
        process.kill()
        process.communicate()


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def gone(pid, within=20.0):
    ends = time.monotonic() + within
    while time.monotonic() < ends:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_serve_says_where_it_listens_answers_and_ends_in_order(guard, pack, tmp_path):
    listen = ["--listen", "127.0.0.1:0", "--listen", f"unix:{tmp_path}/g.sock"]
    with started("serve", "--pack", pack, *listen, "--metrics", "127.0.0.1:0", until="serving") as (process, said):
        first, second, metrics, _ = said.splitlines()
        assert second == f"gRPC listens on unix:{tmp_path}/g.sock"
        assert metrics.startswith("metrics on http://127.0.0.1:")
        address = first.removeprefix("gRPC listens on ")
        remote = json.loads(guard("check", "--address", address, "--json", "hello there").out)
        local = json.loads(guard("check", "--pack", pack, "--json", "hello there").out)
        assert scores(remote) == pytest.approx(scores(local), abs=1e-5)
        found = guard("watch", "--address", address, "--json", stdin=b"hello\nthere")
        assert len(found.out.splitlines()) == 3
        taken = guard("serve", "--pack", pack, "--listen", address, "--metrics", "")
        assert taken.status == 1
        assert taken.err.splitlines()[-1] == f"guard: error: server.listen: {address}: Address already in use"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_log_that_nobody_reads_fails_no_call(pack, tmp_path):
    taps = f"unix:{tmp_path}/taps.sock"
    options = ("--listen", "127.0.0.1:0", "--metrics", "", "--taps", taps, "--set", "taps.wait_seconds=0.5")
    with started("serve", "--pack", pack, *options, until="serving") as (process, said):
        process.stderr.close()  # what is logged from here on meets a broken pipe
        address = said.splitlines()[0].removeprefix("gRPC listens on ")
        with GuardClient(address, timeout_s=20) as client:
            for _ in range(2):  # the first line may still find room in the pipe
                last = list(client.follow("nobody's"))[-1]
                assert (last.finish_reason, last.verdict.action) == ("no_rows", "not_assessed")
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="taps"))
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_demo_once_shows_every_prompt_and_leaves_nothing_behind(pack):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*GUARD, "demo", "--once", "--pack", str(pack)], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    prompts = [json.loads(line) for line in (ROOT / "guard/lab/data/demo.jsonl").read_text().splitlines()]
    assert done.stdout.count("tokens coloured by their part in") == len(prompts)
    assert all(prompt["id"] in done.stdout for prompt in prompts)
    assert "curl -s http://127.0.0.1:" in done.stdout
    address = done.stdout.split("gRPC listens on ")[1].split(",")[0]
    assert (
        subprocess.run(
            [*GUARD, "check", "--address", address, "x"], check=False, capture_output=True, env=env
        ).returncode
        == 1
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + 15), (signal.SIGKILL, -9)])
def test_demo_serves_until_a_signal_and_takes_its_sidecar_along(pack, number, status):
    with started("demo", "--pack", pack, until="until Ctrl-C") as (process, _):
        (sidecar,) = children(process)
        process.send_signal(number)
        assert process.wait(60) == status
        assert gone(sidecar)


def test_demo_refuses_settings_that_its_own_calls_could_not_meet(tmp_path):
    env = {**os.environ, "GUARD_SERVER__TLS_CERTIFICATE": "mine.pem", "GUARD_SERVER__TLS_KEY": "mine.key"}
    done = subprocess.run(
        [*GUARD, "demo", "--once"], capture_output=True, text=True, check=False, env=env, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "the demo speaks to its sidecar without TLS: found server.tls_certificate = mine.pem" in done.stderr


def test_demo_tells_why_its_sidecar_did_not_start(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*GUARD, "demo", "--pack", str(tmp_path)], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"guard: error: the sidecar ended with status 1: {tmp_path}/manifest.toml: found no such file, "
        "expected a pack's manifest.toml\n"
    )


def test_the_shipped_pack_passes_its_own_cases(guard, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = guard("pack", "check")
    assert found.status == 0, found.out
    assert "FAIL" not in found.out


def test_the_shipped_pack_names_its_features(assessor, guard, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = weights.resolve(weights.DEFAULT_MODEL)
    assert check_model(assessor.pack, weights.fingerprint(folder), False).verified
    told = json.loads(guard("features", "--pack", DEFAULT_PACK, "--limit", "0", "--json").out)
    assert [f["name"] for f in told] == [f.name for f in assessor.features()]
    assert {f["latent"]["hook_point"] for f in told} == {p.name for p in assessor.pack.hook_points}
