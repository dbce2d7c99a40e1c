"""Time and memory of harvest and train, and how they grow: `python -m benchmarks.lab CORPUS`.

CORPUS is a text file or a folder of them; it is not shipped. Each figure is of a whole command in a process of its
own. What a million tokens cost is told by the difference of the largest run and the smallest, so that imports and the
loading of the model do not count. Writes benchmarks/results/lab.json.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe

POINTS = ("model.layers.7", "model.layers.13", "model.layers.19")
HARVESTED = (65_536, 131_072, 262_144)
TRAINED = (131_072, 262_144, 524_288)
RESULT = Path(__file__).parent / "results" / "lab.json"


@dataclass(frozen=True)
class Run:
    stage: str
    tokens: int
    saes: int
    width: int
    seconds: float
    megabytes: float  # at its peak


def main(corpus: Path) -> None:
    machine = describe()  # before the runs: the load is that of others
    with tempfile.TemporaryDirectory() as folder:
        runs = [*_harvests(corpus, Path(folder)), *_trainings(Path(folder))]
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(_table(runs))
    costs = {
        "harvest, s a million tokens": _slope([r for r in runs if r.stage == "harvest"]),
        "train one SAE of 2,304 latents, s a million tokens": _slope(_series(runs, "tokens")),
    }
    for name, value in costs.items():
        console.print(f"{name}: {value:.0f}")
    RESULT.write_text(
        json.dumps({"machine": machine, "runs": [asdict(r) for r in runs], "costs": costs}, indent=2) + "\n"
    )


def _harvests(corpus: Path, folder: Path) -> Iterator[Run]:
    """Three hook points, the deepest behind layer 19 of SmolLM2-135M's 30. The largest stays, to train on."""
    points = [word for point in POINTS for word in ("--hook-point", point)]
    for tokens in HARVESTED:
        out = folder / f"activations-{tokens}"
        spent = _spent(["harvest", "--corpus", str(corpus), *points, "--tokens", str(tokens), "--out", str(out)])
        yield Run("harvest", tokens, 0, 0, *spent)


def _trainings(folder: Path) -> Iterator[Run]:
    grown = [(tokens, 1, 2304) for tokens in TRAINED]
    grown += [(TRAINED[0], saes, 2304) for saes in (2, 4)]
    grown += [(TRAINED[0], 1, width) for width in (1152, 4608)]
    for tokens, saes, width in grown:
        out = folder / f"saes-{tokens}-{saes}-{width}"
        file = folder / "suite.toml"
        l0 = [16, 32, 64, 128][:saes]
        file.write_text(
            f"tokens = {tokens}\n[[grid]]\nhook_points = ['{POINTS[1]}']\nwidths = [{width}]\nl0 = {l0}\n",
            encoding="utf-8",
        )
        activations = str(folder / f"activations-{HARVESTED[-1]}")
        spent = _spent(["train", "--config", str(file), "--activations", activations, "--out", str(out)])
        told = json.loads((out / "report.json").read_text(encoding="utf-8"))
        if len(told) != saes or any(entry["tokens_trained"] != tokens for entry in told):
            raise SystemExit(f"{out}: trained something else than asked, no figure")
        yield Run("train", tokens, saes, width, *spent)


def _spent(arguments: Sequence[str]) -> tuple[float, float]:
    """Wall seconds and peak megabytes of `guard lab ...`; ends the benchmark where the command fails."""
    started = time.perf_counter()
    quiet = [(os.POSIX_SPAWN_OPEN, descriptor, os.devnull, os.O_WRONLY, 0) for descriptor in (1, 2)]
    command = [sys.executable, "-m", "guard.cli.main", "lab", *arguments]
    child = os.posix_spawn(sys.executable, command, os.environ, file_actions=quiet)
    _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: exit status {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - started, used.ru_maxrss / 1024


def _series(runs: Sequence[Run], grows: str) -> list[Run]:
    """The trainings that differ from the smallest of them in one thing."""
    rest = {"tokens": ("saes", "width"), "saes": ("tokens", "width"), "width": ("tokens", "saes")}[grows]
    base = next(r for r in runs if r.stage == "train")
    found = [r for r in runs if r.stage == "train" and all(getattr(r, k) == getattr(base, k) for k in rest)]
    return sorted(found, key=lambda r: int(getattr(r, grows)))


def _slope(series: Sequence[Run]) -> float:
    first, last = series[0], series[-1]
    return (last.seconds - first.seconds) / (last.tokens - first.tokens) * 1e6


def _table(runs: Sequence[Run]) -> Table:
    shown = Table(title="lab: whole commands", title_justify="left", title_style="bold")
    for heading in ("stage", "grows", "tokens", "SAEs", "width", "seconds", "peak MB"):
        shown.add_column(heading, justify="left" if heading in {"stage", "grows"} else "right")
    for stage, grows, series in (
        ("harvest", "tokens", [r for r in runs if r.stage == "harvest"]),
        *(("train", grows, _series(runs, grows)) for grows in ("tokens", "saes", "width")),
    ):
        for r in series:
            sizes = (f"{n:,}" if n else "" for n in (r.tokens, r.saes, r.width))
            shown.add_row(stage, grows, *sizes, f"{r.seconds:.1f}", f"{r.megabytes:,.0f}")
        shown.add_section()
    return shown


if __name__ == "__main__":
    main(Path(sys.argv[1]))
