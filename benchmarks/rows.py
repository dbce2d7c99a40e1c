"""`python -m benchmarks.rows`: what rounding a pack's rows costs in hits, scores and decisions.

No GPU is needed: a rounded row is multiplied as its rounded value in float32, which is what the kernel does too. Texts
are the project's own sentences, every 97th. Writes benchmarks/results/rows.json.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.given import assessing, scores
from benchmarks.machine import describe
from guard.assessor import Assessor
from guard.config import DEFAULT_PACK
from guard.kernels.columns import rounded
from guard.kernels.contract import EncodeRows
from guard.records import CheckInput, Verdict

DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
EVERY = 97
SENTENCES = Path(__file__).parents[1] / "guard" / "lab" / "data"
RESULT = Path(__file__).parent / "results" / "rows.json"


def main() -> None:
    texts = _texts()
    with assessing(DEFAULT_PACK, "float32") as (assessor, _):
        exact = assessor.pipeline.rows
        expected, hits = _read(assessor, texts)
        figures = {}
        for name, dtype in DTYPES.items():
            assessor.pipeline.rows = [_rounded(rows, dtype) for rows in exact]
            found, moved = _read(assessor, texts)
            figures[name] = _figures(found, expected, moved, hits)
    shown = Table(title=f"rounded rows, {len(texts)} texts", title_justify="left", title_style="bold")
    shown.add_column("rows")
    for heading in next(iter(figures.values())):
        shown.add_column(heading, justify="right")
    for name, told in figures.items():
        shown.add_row(name, *(f"{value:.3g}" for value in told.values()))
    Console(width=None if sys.stdout.isatty() else 150).print(shown)
    told = {"machine": describe(), "texts": len(texts), "rows": figures}
    RESULT.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _texts() -> list[str]:
    lines = [
        line for file in sorted(SENTENCES.glob("sentences.*.jsonl")) for line in file.read_text("utf-8").splitlines()
    ]
    return [json.loads(line)["text"] for line in lines[::EVERY]]


def _rounded(rows: EncodeRows, dtype: torch.dtype) -> EncodeRows:
    def mended(table: torch.Tensor) -> torch.Tensor:
        kept, gain = rounded(table, dtype)
        return kept.float() if gain is None else kept.float() * gain[:, None]

    return replace(rows, enc_rows=mended(rows.enc_rows), probe_rows=mended(rows.probe_rows))


def _read(assessor: Assessor, texts: list[str]) -> tuple[list[Verdict], list[set[tuple[int, int, int]]]]:
    """Each text's verdict, and its hits as (hook point, token, row)."""
    seen: list[set[tuple[int, int, int]]] = []
    absorb = assessor.pipeline.absorb

    def watching(reading, units, *, keep_details):  # noqa: ANN001, ANN202 - as the method that it stands before
        encoded = [unit.encoded for unit, _ in units]
        seen.append(
            {
                (point, int(token), int(row))
                for parts in encoded
                for point, part in enumerate(parts)
                for token, row in zip(np.asarray(part.token), np.asarray(part.row), strict=True)
            }
        )
        absorb(reading, units, keep_details=keep_details)

    assessor.pipeline.absorb = watching  # type: ignore[method-assign]
    try:
        return [assessor.check(CheckInput(text)) for text in texts], seen
    finally:
        assessor.pipeline.absorb = absorb  # type: ignore[method-assign]


def _figures(
    found: list[Verdict],
    expected: list[Verdict],
    moved: list[set[tuple[int, int, int]]],
    hits: list[set[tuple[int, int, int]]],
) -> dict[str, float]:
    apart = [
        abs(value - scores(theirs)[name])
        for ours, theirs in zip(found, expected, strict=True)
        for name, value in scores(ours).items()
    ]
    changed = sum(len(a ^ b) for a, b in zip(moved, hits, strict=True))
    flips = sum(a.action != b.action for a, b in zip(found, expected, strict=True))
    return {
        "hits that came or went, %": 100 * changed / sum(len(part) for part in hits),
        "score apart, mean": float(np.mean(apart)),
        "99%": float(np.quantile(apart, 0.99)),
        "most": float(np.max(apart)),
        "decisions flipped, %": 100 * flips / len(found),
    }


if __name__ == "__main__":
    main()
