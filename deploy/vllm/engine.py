"""A vLLM server of our own, on loopback, for as long as a block lasts. Runs with or without the guard's tap."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 400.0
_STOP_SECONDS = 20.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # to loopback, whatever http_proxy says


class EngineFailedError(RuntimeError):
    """The server did not start; the message ends with its own last words."""


@dataclass(frozen=True, slots=True)
class Engine:
    url: str  # http://127.0.0.1:PORT
    log: Path
    start_seconds: float
    session: int  # of which all its processes are

    def cpu_seconds(self) -> float:
        """CPU time that its processes have used so far, user and system."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # ended meanwhile
                fields = stat.read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12]) if int(fields[3]) == self.session else 0
        return ticks / os.sysconf("SC_CLK_TCK")

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels, as the server tells Prometheus."""
        with _DIRECT.open(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0] == name)


def environment() -> Path:
    """The folder that deploy/vllm/setup.sh made; SAE_GUARD_VLLM names another one."""
    return Path(os.environ.get("SAE_GUARD_VLLM", ROOT / ".build" / "vllm"))


@contextmanager
def serving(
    model: Path, log: Path, *, guard: dict[str, object] | None = None, arguments: Sequence[str] = ()
) -> Iterator[Engine]:
    """`guard` as additional_config.guard; None serves without a tap. Raises EngineFailedError."""
    port = _free_port()
    command = [str(environment() / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "2048", *arguments]
    if guard is not None:
        command += ["--additional-config", json.dumps({"guard": guard})]
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_PLUGINS": "guard",
    }
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **settings},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its workers too end with it
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await(process, url, log)
        yield Engine(url, log, time.monotonic() - started, process.pid)
    finally:
        _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    ends = time.monotonic() + START_SECONDS
    while time.monotonic() < ends:
        if process.poll() is not None:
            break
        with suppress(urllib.error.URLError, OSError):
            _DIRECT.open(f"{url}/health", timeout=5).close()
            return
        time.sleep(0.5)
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    reasons = [line for line in said if "Error" in line] or said
    raise EngineFailedError(f"vLLM did not start; {log} ends with:\n" + "\n".join(reasons[-5:]))


def _end(process: "subprocess.Popen[bytes]") -> None:
    """In order first; what is left of its session is killed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
