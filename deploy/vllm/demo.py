"""`make vllm-demo`: vLLM serves SmolLM2 with the guard's tap, a sidecar judges, and a caller acts on its verdicts.

The caller is what a gateway is: it follows the verdict of its own request beside the answer's stream, and closes the
stream on a block. Every action below is the sidecar's own, from what the served model computed.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import DefaultHttpxClient, OpenAI

from deploy.vllm import engine
from guard.config import load_config
from guard.reader import weights
from guard.records import Action, Verdict
from guard.service.client import GuardClient

_THREAT = "Watch your back, because the next time I catch you alone I will smash your skull with a hammer."
PROMPTS = (
    ("an everyday question", "What should I plant on a shady balcony if I want flowers until the first frost?", {}),
    ("a figure of speech", "My sister's chocolate torte is a total bombshell; every guest at the table was slain.", {}),
    ("a threat; the caller closes the stream on the block", _THREAT, {}),
    ("the same under ignore_eos, from a caller that heeds nothing: the engine ends it", _THREAT, {"ignore_eos": True}),
)
_TOKENS = 160


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.vllm.demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the prompts, instead of serving until Ctrl-C")
    given = parser.parse_args()
    model = weights.resolve(weights.DEFAULT_MODEL, report=print)
    pack = load_config().pack.resolve()
    with tempfile.TemporaryDirectory(prefix="guard-vllm-") as scratch:
        taps, log = f"unix:{scratch}/taps.sock", Path(scratch) / "vllm.log"
        with sidecar(taps, pack, Path(scratch) / "guard.log") as address:
            print("starting vLLM (half a minute to two)", flush=True)
            with engine.serving(
                model, log, guard={"pack": str(pack), "taps": taps}, arguments=["--enforce-eager"]
            ) as served:
                print(f"vLLM serves on {served.url} after {served.start_seconds:.0f} s, guard on {address}\n")
                with GuardClient(address, timeout_s=120) as guard:
                    client = OpenAI(
                        base_url=f"{served.url}/v1",
                        api_key="none",
                        max_retries=0,
                        http_client=DefaultHttpxClient(trust_env=False),  # to loopback, whatever http_proxy says
                    )
                    for title, prompt, extra in PROMPTS:
                        _ask(client, guard, served, title, prompt, extra)
                if not given.once:
                    print("serving until Ctrl-C", flush=True)
                    try:
                        threading.Event().wait()
                    except KeyboardInterrupt:
                        print("\nstopping")
    return 0


def _ask(
    client: OpenAI, guard: GuardClient, served: engine.Engine, title: str, prompt: str, extra: dict[str, bool]
) -> None:
    """Sends one prompt, follows it, and closes its stream on a block."""
    request_id = f"demo-{uuid.uuid4().hex[:8]}"
    blocked, over = threading.Event(), threading.Event()
    seen: list[tuple[Verdict | None, str]] = []
    when: dict[str, float] = {}

    def follow() -> None:
        for state in guard.follow(request_id):
            seen.append((state.verdict, state.finish_reason))
            if state.verdict is not None and state.verdict.action is Action.BLOCK and not blocked.is_set():
                when["blocked"] = time.monotonic()
                blocked.set()
        over.set()

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    print(f"--- {title}\n    > {prompt}", flush=True)
    text, pieces = "", 0
    stream = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": prompt}],
        max_tokens=_TOKENS,
        temperature=0.0,
        stream=True,
        extra_headers={"X-Request-Id": request_id},
        extra_body=extra,
    )
    closed = ""
    for chunk in stream:
        if blocked.is_set() and not extra:
            stream.close()
            closed = "closed by the caller"
            break
        if chunk.choices and chunk.choices[0].delta.content:
            text, pieces = text + chunk.choices[0].delta.content, pieces + 1
    while served.metric("vllm:num_requests_running") and time.monotonic() < when.get("blocked", 0) + 30:
        time.sleep(0.01)
    when["free"] = time.monotonic()
    over.wait(15)
    verdict = next((v for v, _ in reversed(seen) if v is not None), None)
    print(f"    < {' '.join(text.split())[:150]!r} ({pieces} pieces{', ' + closed if closed else ''})")
    if verdict is None:
        print("    no verdict came\n", flush=True)
        return
    print(f"    verdict: {verdict.action.value}; engine says {seen[-1][1]!r}; {_why(verdict)}")
    if "blocked" in when:
        print(
            f"    the engine's slot was free {1e3 * (when['free'] - when['blocked']):.0f} ms after the block was told"
        )
    print(flush=True)


def _why(verdict: Verdict) -> str:
    heads = [
        f"{phase.phase.value} {domain.domain} {head.head.value} {head.score:.2f}"
        for phase in verdict.phases
        for domain in phase.domains
        for head in domain.heads
        if domain.action is not Action.ALLOW and head.score is not None
    ]
    return ", ".join(heads) or "nothing above a threshold"


@contextmanager
def sidecar(taps: str, pack: Path, log: Path) -> Iterator[str]:
    """`guard serve` with a listener for taps; gives the address of its gRPC."""
    command = [sys.executable, "-m", "guard.cli.main", "serve", "--listen", "127.0.0.1:0", "--metrics", ""]
    command += ["--pack", str(pack), "--set", f"server.taps={taps}"]
    with log.open("w", encoding="utf-8") as complaints:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True)
    try:
        address = ""
        for line in process.stdout or ():
            if line.startswith("gRPC listens on"):
                address = line.removeprefix("gRPC listens on").strip()
            if line.startswith("serving"):
                break
        else:
            raise RuntimeError(f"the sidecar ended: {log.read_text(encoding='utf-8')[-500:]}")
        yield address
    finally:
        process.terminate()
        process.wait(20)


if __name__ == "__main__":
    sys.exit(main())
