"""What the vLLM tap costs: two live servers, one with the guard and a sidecar, used in turn.

    python -m benchmarks.vllm_overhead [--pairs 12] [--eager]

Needs the environment of deploy/vllm/setup.sh. Servers that run one behind the other differ by more than the tap costs,
so both live at once, each pair sends the same load to both (in alternating order), and the figure is the median of the
pairs' ratios. The sidecar runs on the same cores. Exit status 1 where a ratio is below the bar.
"""

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
from rich.console import Console

from benchmarks.figures import Report, table
from benchmarks.machine import describe
from deploy.vllm import engine
from deploy.vllm.demo import sidecar
from guard.config import load_config
from guard.pack.loader import load_pack
from guard.reader import weights

BAR = 0.98
_OWN = re.compile(r"guard: (\d+) steps, (\d+) tokens; own time ([\d.]+) us a token, ([\d.]+)% of the steps'")


@dataclass(frozen=True, slots=True)
class Load:
    name: str
    requests: int  # at once
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        return self.requests * (self.prompt_tokens + self.new_tokens)


LOADS = (Load("prefill", 8, 400, 4), Load("decode", 8, 24, 64))


@dataclass(frozen=True, slots=True)
class Ran:
    seconds: float
    time_per_output_token: float  # seconds, median over the requests
    cpu_seconds: float  # of the server's processes


def run(server: engine.Engine, load: Load, seed: int) -> Ran:
    """Sends the load once; prompts are random ids, so that no two of them share a cached prefix."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(100, 40_000) for _ in range(load.prompt_tokens)] for _ in range(load.requests)]
    started, used = time.perf_counter(), server.cpu_seconds()
    with ThreadPoolExecutor(load.requests) as pool:
        paces = list(pool.map(lambda prompt: _one(server.url, prompt, load.new_tokens), prompts))
    seconds = time.perf_counter() - started
    return Ran(seconds, statistics.median(paces), server.cpu_seconds() - used)


def _one(url: str, prompt: list[int], new_tokens: int) -> float:
    """Seconds between the tokens of one answer."""
    asked = {
        "model": "smollm2",
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    came: list[float] = []
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=300) as answer:
        answer.raise_for_status()
        came += [time.perf_counter() for line in answer.iter_lines() if line.startswith("data: {")]
    return (came[-1] - came[0]) / max(1, len(came) - 1)


def measure(report: Report, load: Load, plain: engine.Engine, guarded: engine.Engine, pairs: int) -> None:
    ran: dict[str, list[Ran]] = {plain.url: [], guarded.url: []}
    for pair in range(-1, pairs):  # the first pair warms up
        for server in (plain, guarded) if pair % 2 else (guarded, plain):
            once = run(server, load, seed=100 + pair)  # -1 and 1 would draw the same
            if pair >= 0:
                ran[server.url].append(once)
    before, after = ran[plain.url], ran[guarded.url]
    report.add(
        f"{load.name}: {load.requests} x ({load.prompt_tokens} + {load.new_tokens}) tokens",
        [once.seconds for once in after],
        ("without the guard", [once.seconds for once in before]),
        "throughput against that without the guard",
        scale=1.0,
        unit="s",
        inverse=True,
        at_least=BAR,
    )
    report.add(
        f"{load.name}: time per output token",
        [once.time_per_output_token for once in after],
        ("without the guard", [once.time_per_output_token for once in before]),
        "the time without the guard over this one",
        inverse=True,
        at_least=BAR,
    )
    report.add(
        f"{load.name}: CPU time of the server",
        [once.cpu_seconds for once in after],
        ("without the guard", [once.cpu_seconds for once in before]),
        "the CPU time without the guard over this one; the sidecar's is not in it",
        scale=1.0,
        unit="s",
        inverse=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_overhead", description=__doc__)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--backend", default="auto", help="which implementation encodes")
    parser.add_argument("--eager", action="store_true", help="without compilation: starts in half the time")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "vllm_overhead.json")
    given = parser.parse_args()
    model, pack = weights.resolve(weights.DEFAULT_MODEL), load_config().pack.resolve()
    arguments = ["--dtype", "bfloat16", *(["--enforce-eager"] if given.eager else [])]
    machine = describe()
    with tempfile.TemporaryDirectory(prefix="guard-vllm-") as name, ExitStack() as stack:
        scratch = Path(name)
        taps = f"unix:{scratch}/taps.sock"
        stack.enter_context(sidecar(taps, pack, scratch / "guard.log"))
        settings = {"pack": str(pack), "taps": taps, "backend": given.backend}
        guarded = stack.enter_context(
            engine.serving(model, scratch / "guarded.log", guard=settings, arguments=arguments)
        )
        plain = stack.enter_context(engine.serving(model, scratch / "plain.log", arguments=arguments))
        report = Report("vllm_overhead")
        for load in LOADS:
            measure(report, load, plain, guarded, given.pairs)
        threading.Event().wait(31)  # the tap tells its own time every 30 seconds of steps
        run(guarded, LOADS[1], seed=-2)
        own = _OWN.findall(guarded.log.read_text(encoding="utf-8", errors="replace"))[-1]
        version = httpx.get(f"{plain.url}/version", timeout=10).json()["version"]
    report.notes |= {
        "steps of the guarded server": float(own[0]),
        "tokens of the guarded server": float(own[1]),
        "the tap's own time, us a token": float(own[2]),
        "the tap's own time, % of the steps'": float(own[3]),
        "encoder": given.backend,
        "vLLM": f"{version}, bfloat16, {'eager' if given.eager else 'compiled'}",
    }
    info = load_pack(pack).info
    told = {"machine": machine, "pack": {"id": info.id, "version": info.version, "hash": info.hash}}
    given.json.write_text(json.dumps({**report.as_json(), **told}, indent=2) + "\n", encoding="utf-8")
    Console(width=150).print(table(report))
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
