"""`python -m benchmarks [name ...]`: runs the suites, prints a table each, and writes benchmarks/results/NAME.json.

Exit status 1 where a figure was refused because an output was wrong, or where a bar was missed.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from benchmarks import batching, encode, latency, prefixes, scale, service, shapes, streaming, streams, waiting
from benchmarks.figures import Report, table
from benchmarks.machine import describe
from benchmarks.peers import suite as peers
from guard.config import DEFAULT_PACK
from guard.pack.loader import load_pack

SUITES = {
    "latency": latency.run,
    "batching": batching.run,
    "streaming": streaming.run,
    "encode": encode.run,
    "shapes": shapes.run,
    "scale": scale.run,
    "peers": peers.run,
    "service": service.run,
    "waiting": waiting.run,
    "prefixes": prefixes.run,
    "streams": streams.run,
}
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"suites to run: {', '.join(SUITES)} (default: all)")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="PATH", help="folder that NAME.json goes to")
    parser.add_argument("--pack", type=Path, default=DEFAULT_PACK, help="the pack's folder")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats of each measurement")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in SUITES]:
        parser.error(f"unknown suite {unknown[0]!r}, expected one of: {', '.join(SUITES)}")

    console, failed = Console(width=None if sys.stdout.isatty() else 150), False
    info = load_pack(given.pack).info
    for name in given.names or SUITES:
        report = Report(name)
        machine = describe()  # before the suite: the load is that of others
        with console.status(f"{name} ..."):
            SUITES[name](report, given.pack, given.repeats)
        console.print(
            table(report), f"[dim]{machine['cpu']}, {machine['threads']} threads, load {machine['load']}[/]\n"
        )
        given.json.mkdir(parents=True, exist_ok=True)
        told = {"machine": machine, "pack": {"id": info.id, "version": info.version, "hash": info.hash}}
        (given.json / f"{name}.json").write_text(json.dumps({**report.as_json(), **told}, indent=2) + "\n")
        failed |= report.failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
