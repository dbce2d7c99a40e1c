"""What an encode costs against the number of tokens, of rows and of hook points."""

from pathlib import Path

import torch

from benchmarks.figures import Report, interleaved
from benchmarks.given_cpu import DTYPES, Shape, disagreement, make_case, served
from guard.errors import ConfigError
from guard.kernels import choice

D_MODEL, TOKENS, ROWS = 2048, 128, 400
LADDERS = {
    "tokens": [(tokens, Shape(D_MODEL, (ROWS,)), tokens) for tokens in (1, 4, 16, 64, 256, 1024)],
    "rows": [(rows, Shape(D_MODEL, (rows,)), TOKENS) for rows in (50, 200, 800, 3200)],
    "hook points": [(points, Shape(D_MODEL, (ROWS,) * points), TOKENS) for points in (1, 2, 4, 8)],
}


def run(report: Report, _pack: Path, repeats: int) -> None:
    """Each ladder's ratios are against its first rung; one text, pooled."""
    report.notes["where nothing else is said"] = f"d_model {D_MODEL}, {TOKENS} tokens, {ROWS} rows, 1 hook point"
    for name in DTYPES:
        try:
            encoder = choice.choose(name)
        except ConfigError as error:
            report.notes[name] = str(error)
            continue
        for ladder, rungs in LADDERS.items():
            cases = {}
            for size, shape, tokens in rungs:
                case = make_case(shape, tokens)
                if why := disagreement(case, name):
                    report.refuse(f"{name}, {size} {ladder}", why)
                else:
                    cases[f"{name}, {size} {ladder}"] = served(case, encoder)
            with torch.inference_mode():
                seconds = interleaved(cases, repeats, warm=True)
            for label, spent in seconds.items():
                first = next(iter(seconds))
                report.add(label, spent, (first, seconds[first]), scale=1e6, unit="us")
