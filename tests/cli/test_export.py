"""`guard export`, and what is served from its folder: no torch in the process, and the torch reader's scores."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from guard.cli.main import main
from guard.reader import weights
from tests.cli.given import make_pack

ROOT = Path(__file__).parents[2]
TEXT = "I will hurt you with a knife, dear 朋友 👍"
SERVE = """
import sys
from guard.cli.main import main
status = main(["serve", *sys.argv[1:]])
print("loaded:", *sorted({"torch", "transformers", "onnx"} & set(sys.modules)))
sys.exit(status)
"""


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    made_for = weights.fingerprint(weights.resolve(weights.DEFAULT_MODEL))
    return make_pack(tmp_path_factory.mktemp("packs") / "toy", **made_for, width=576)


@pytest.fixture(scope="module")
def folder(pack, tmp_path_factory):
    made = tmp_path_factory.mktemp("exported") / "reader"
    assert main(["export", str(made), "--pack", str(pack)]) == 0
    return made


def scores(told):
    return [h["score"] for p in told["phases"] for d in p["domains"] for h in d["heads"]]


def test_an_exported_folder_is_served_without_torch(guard, pack, folder):
    expected = json.loads(guard("check", "--pack", pack, "--json", TEXT).out)
    arguments = [
        "--pack",
        pack,
        "--set",
        f"reader.model={folder}",
        "--listen",
        "127.0.0.1:0",
        "--metrics",
        "127.0.0.1:0",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    try:
        listening = process.stdout.readline().split()
        assert listening[:3] == ["gRPC", "listens", "on"], process.communicate()[1]
        found = json.loads(guard("check", "--address", listening[3], "--json", TEXT).out)
        watched = guard("watch", "--address", listening[3], "--json", stdin=f"{TEXT}\n".encode())
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert scores(found) == pytest.approx(scores(expected), abs=1e-4)
    assert scores(json.loads(watched.out.splitlines()[-1])) == pytest.approx(scores(expected), abs=0.05)
    assert found["model"] == expected["model"]
    assert process.returncode == 0, err
    assert out.splitlines()[-1].split() == ["loaded:"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("encode.backend=cpu", "encode.backend: found 'cpu', expected auto or numpy"),
        ("reader.dtype=bfloat16", "reader.dtype: found 'bfloat16', expected it unset"),
    ],
)
def test_settings_that_need_torch_are_refused(guard, pack, folder, setting, message):
    found = guard("check", "--pack", pack, "--set", f"reader.model={folder}", "--set", setting, "text")
    assert found.status == 1
    assert message in found.err


def test_a_folder_made_for_another_pack_is_refused_and_never_written_over(guard, pack, folder):
    found = guard("check", "--set", f"reader.model={folder}", "text")
    assert "found hook points model.layers.2, expected model.layers.0" in found.err
    again = guard("export", folder, "--pack", pack)
    assert "found it there already, expected a new folder" in again.err
