"""`python -m benchmarks.fidelity --data FOLDER EXPORTED [EXPORTED ...]`: what exported readers change.

Rows are drawn over the sources of FOLDER (`*.jsonl`, each line with a `text`), with a fixed seed. Each exported folder
is held against the torch reader in float32: cosine similarity of every token's activations at each hook point, the
difference of every score, and how many decisions (allow, flag, block) are other ones. Writes
benchmarks/results/fidelity.json. Exit status 1 where a bar is missed.
"""

import argparse
import json
import random
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.given import scores
from benchmarks.machine import describe
from guard.assessor import Assessor
from guard.config import DEFAULT_PACK, load_config
from guard.records import CheckInput, Verdict

RESULTS = Path(__file__).parent / "results" / "fidelity.json"
FLIPS = 0.005  # share of decisions that may be other ones
SHORT = 160  # characters of a row, at most
TOGETHER = 128  # rows that wait at a time
COSINES = 60  # rows whose activations are compared; scores are compared for all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    parser.add_argument("exported", nargs="+", type=Path, help="folders that guard export made")
    parser.add_argument("--data", type=Path, required=True, help="folder of *.jsonl, one source each")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pack", type=Path, default=DEFAULT_PACK)
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    console = Console()
    texts = sample(given.data, given.rows, given.seed)
    settings = {"pack": str(given.pack)}
    # A process each, of one thread: what is compared here are outputs, not times.
    with ProcessPoolExecutor(1 + len(given.exported), get_context("spawn")) as pool:
        first = pool.submit(_read, {**settings, "reader": {"threads": 1}}, texts)
        others = {
            folder: pool.submit(_read, {**settings, "reader": {"threads": 1, "model": str(folder)}}, texts)
            for folder in given.exported
        }
    truth, found = first.result(), {}
    for folder, other in others.items():
        own = other.result()
        found[folder.name] = {"dtype": own["dtype"], **compared(own, truth)}
        console.print(folder.name)
        console.print_json(json.dumps(found[folder.name]))
    told = {"rows": len(texts), "seed": given.seed, "against": "torch float32", "machine": describe(), "readers": found}
    given.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return int(any(reader["flips"]["share"] > FLIPS for reader in found.values()))


def sample(data: Path, rows: int, seed: int) -> list[str]:
    """As many rows of each source as possible, to `rows` in all; the same ones for the same seed."""
    rng = random.Random(seed)
    files = sorted(data.glob("*.jsonl"))
    texts = []
    for number, file in enumerate(files):
        lines = file.read_text(encoding="utf-8").splitlines()
        short = sorted({text for line in lines if 0 < len(text := json.loads(line)["text"].strip()) <= SHORT})
        wanted = rows * (number + 1) // len(files) - rows * number // len(files)
        texts += rng.sample(short, min(wanted, len(short)))
    return texts


def _read(overrides: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    assessor = Assessor.load(load_config(overrides=overrides))
    try:
        verdicts = []
        for start in range(0, len(texts), TOGETHER):
            waiting = [assessor.submit(CheckInput(text)) for text in texts[start : start + TOGETHER]]
            verdicts += [future.result() for future in waiting]
        pipeline = assessor.pipeline
        seen = []
        for text in texts[:: max(1, len(texts) // COSINES)]:
            ids = [pipeline.tokenizer.sink_id, *pipeline.tokenizer.text(text).ids[:255]]
            (read,) = pipeline.reader.read([ids])
            seen.append({point: np.array(read[point])[1:] for point in pipeline.reader.hook_points})
    finally:
        assessor.close()
    return {"dtype": assessor.reader_dtype, "verdicts": verdicts, "seen": seen}


def compared(found: dict[str, Any], truth: dict[str, Any]) -> dict[str, Any]:
    cosines: dict[str, Any] = {}
    for point in truth["seen"][0]:
        pairs = [(own[point], true[point]) for own, true in zip(found["seen"], truth["seen"], strict=True)]
        every = np.concatenate([_cosine(own, true) for own, true in pairs])
        cosines[point] = {"mean": float(every.mean()), "p1": float(np.quantile(every, 0.01)), "min": float(every.min())}
    verdicts: list[tuple[Verdict, Verdict]] = list(zip(found["verdicts"], truth["verdicts"], strict=True))
    differences = np.array(
        [
            abs(own - true)
            for ours, theirs in verdicts
            for own, true in zip(scores(ours).values(), scores(theirs).values(), strict=True)
        ]
    )
    flips = [f"{theirs.action} to {ours.action}" for ours, theirs in verdicts if ours.action != theirs.action]
    return {
        "cosine": cosines,
        "score difference": {
            "mean": float(differences.mean()),
            "p99": float(np.quantile(differences, 0.99)),
            "max": float(differences.max()),
        },
        "flips": {"count": len(flips), "share": len(flips) / len(verdicts), "bar": FLIPS, "which": Counter(flips)},
        "decisions": Counter(str(theirs.action) for _, theirs in verdicts),
    }


def _cosine(own: np.ndarray, true: np.ndarray) -> np.ndarray:
    return (own * true).sum(axis=1) / (np.linalg.norm(own, axis=1) * np.linalg.norm(true, axis=1))


if __name__ == "__main__":
    sys.exit(main())
