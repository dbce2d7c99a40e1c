"""A sidecar that is killed while a real vLLM answers, and started again. `make vllm-test` runs it."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from deploy.vllm import engine
from guard.records import Action, NotAssessedReason
from guard.service.client import GuardClient
from tests.conftest import PACK

pytestmark = [
    pytest.mark.skipif(
        not (engine.environment() / ".installed").exists(),
        reason="no environment with vLLM (3.4 GB): make vllm-test makes it",
    ),
    pytest.mark.timeout(600),
]
TOKENS, AT_ONCE = 400, 16


@contextmanager
def sidecar(folder):
    """`guard serve` on the same two sockets each time; gives the process, which the test may kill."""
    command = [sys.executable, "-m", "guard.cli.main", "serve", "--listen", f"unix:{folder}/guard.sock"]
    command += ["--metrics", "", "--pack", str(PACK), "--set", f"server.taps=unix:{folder}/taps.sock"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                if line.startswith("serving"):
                    break
            yield process
        finally:
            process.terminate()


def answer(served, request_id, tokens=TOKENS):
    asked = {"model": "smollm2", "prompt": f"Tell me about the harbour, {request_id}.", "max_tokens": tokens}
    asked |= {"temperature": 0, "ignore_eos": True}
    with httpx.Client(timeout=400) as client:
        came = client.post(f"{served.url}/v1/completions", json=asked, headers={"X-Request-Id": request_id})
    came.raise_for_status()
    return came.json()["usage"]["completion_tokens"]


def last(folder, request_id):
    """The verdict that a follower of this request is left with."""
    with GuardClient(f"unix:{folder}/guard.sock", timeout_s=60) as guard:
        return [state.verdict for state in guard.follow(request_id) if state.verdict is not None][-1]


def test_a_killed_sidecar_costs_its_verdicts_and_nothing_else(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("kill")
    setting = {"pack": str(PACK), "taps": f"unix:{folder}/taps.sock", "stop": False}
    with (
        engine.serving(model_folder, folder / "vllm.log", guard=setting, arguments=["--enforce-eager"]) as served,
        ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        with sidecar(folder) as first:
            time.sleep(6)  # the tap looks for it every five seconds at the latest
            answer(served, "before", 20)
            assert last(folder, "before").action is not Action.NOT_ASSESSED
            under_way = {name: pool.submit(answer, served, name) for name in (f"way-{n}" for n in range(AT_ONCE))}
            while served.metric("vllm:num_requests_running") < AT_ONCE:
                time.sleep(0.05)
            time.sleep(2)  # some rows of each have gone out
            assert served.metric("vllm:num_requests_running") == AT_ONCE
            first.kill()
        with sidecar(folder):
            assert [future.result(400) for future in under_way.values()] == [TOKENS] * AT_ONCE
            for name in under_way:
                verdict = last(folder, name)
                # What was read of it may be bad enough: a block stands, but nothing is allowed.
                assert verdict.action in {Action.NOT_ASSESSED, Action.BLOCK}, name
                assert {why.reason for why in verdict.not_assessed} == {NotAssessedReason.ROWS_MISSING}
            time.sleep(6)
            answer(served, "after", 20)
            assert last(folder, "after").action is not Action.NOT_ASSESSED
