"""The rows of a pack on real activations: the encoders that serve, the truth, the bare product, the full width."""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.figures import Report, interleaved
from benchmarks.given import assessing, text_of
from guard.assessor import Assessor
from guard.errors import ConfigError
from guard.kernels import choice
from guard.kernels.contract import Encoded, Encoder, EncodeRows
from guard.kernels.reference import ReferenceEncoder

LENGTHS = (16, 128, 1024)
TOLERANCE, SHARE = 1e-4, 1e-6  # of a value: what float32 makes of its own sums in another order
INNER = 4096  # tokens encoded in one measurement, so that short texts are measured too


def run(report: Report, pack: Path, repeats: int) -> None:
    with assessing(pack, "float32") as (assessor, _):
        read = _activations(assessor, max(LENGTHS))
        rows, widths = assessor.pipeline.rows, [p.sae_width for p in assessor.pack.manifest.hook_points]
    report.notes["rows"] = ", ".join(f"{len(r.enc_rows)} of {w}" for r, w in zip(rows, widths, strict=True))
    full = [torch.randn(width, read[0].shape[1]) for width in widths]
    for length in LENGTHS:
        _figures(report, [x[:length].contiguous() for x in read], rows, full, repeats)


def _figures(report: Report, x: list[Tensor], rows: list[EncodeRows], full: list[Tensor], repeats: int) -> None:
    tokens, served, truth = len(x[0]), choice.choose("auto"), ReferenceEncoder()
    rounded = _rounded(report, x, rows)
    name = f"{served.name} encoder, {tokens} tokens"
    for one, own in zip(x, rows, strict=True):
        if why := _differ(served(one, own), truth(one, own)):
            report.refuse(name, why)
            return

    def repeated(work: Callable[[Tensor, int], object]) -> Callable[[], None]:
        @torch.inference_mode()
        def measured() -> None:
            for _ in range(max(1, INNER // tokens)):
                for number, one in enumerate(x):
                    work(one, number)

        return measured

    also = {"rounded": repeated(lambda one, n: rounded(one, rows[n]))} if rounded else {}
    seconds = interleaved(
        {
            "bare": repeated(lambda one, n: one @ rows[n].enc_rows.T),
            "served": repeated(lambda one, n: served(one, rows[n])),
            "reference": repeated(lambda one, n: truth(one, rows[n])),
            "full": repeated(lambda one, n: one @ full[n].T),
            **also,
        },
        repeats,
    )
    per = {case: [s / (max(1, INNER // tokens) * tokens) for s in spent] for case, spent in seconds.items()}
    baseline = (f"bare product of the rows, {tokens} tokens", per["bare"])
    for named, case in (
        (baseline[0], "bare"),
        (name, "served"),
        (f"reference encoder, {tokens} tokens", "reference"),
        (f"full width's product, {tokens} tokens", "full"),
    ):
        report.add(named, per[case], baseline, scale=1e6, unit="us a token")
    if rounded:
        report.add(f"{rounded.name} encoder, {tokens} tokens", per["rounded"], baseline, scale=1e6, unit="us a token")


def _rounded(report: Report, x: list[Tensor], rows: list[EncodeRows]) -> Encoder | None:
    """The bfloat16 encoder where there is one; notes how many hits its rounding flips, and how far from a threshold."""
    try:
        encoder = choice.choose("cpu-bf16")
    except ConfigError as error:
        report.notes["cpu-bf16"] = str(error)
        return None
    flipped = hits = 0
    margins, errors = [0.0], [0.0]
    for one, own in zip(x, rows, strict=True):
        pre, found = one @ own.enc_rows.T + own.bias, encoder(one, own)
        fired = torch.zeros(pre.shape, dtype=torch.bool)
        fired[found.token, found.row] = True
        wrong = fired != (pre > own.threshold)
        flipped, hits = flipped + int(wrong.sum()), hits + int((pre > own.threshold).sum())
        margins += ((pre / own.threshold - 1).abs()[wrong]).tolist()
        errors += (found.value / pre[found.token, found.row] - 1).abs().tolist()
    label = f"cpu-bf16, {len(x[0])} tokens"
    report.notes[f"{label}: hits flipped"] = f"{flipped} of {hits}"
    report.notes[f"{label}: furthest flip, share of the threshold"] = max(margins)
    report.notes[f"{label}: value's error, median and largest share"] = (
        f"{statistics.median(errors):.2g}, {max(errors):.2g}"
    )
    return encoder


def _differ(found: Encoded, expected: Encoded) -> str:
    """Why the encoder's answer is wrong; empty where it is right."""
    if not (torch.equal(found.token, expected.token) and torch.equal(found.row, expected.row)):
        return f"found {len(found.row)} hits, not the {len(expected.row)} of the reference"
    for part in ("value", "probe"):
        ours, theirs = getattr(found, part), getattr(expected, part)
        error = (ours - theirs).abs()
        if bool((error > TOLERANCE + SHARE * theirs.abs()).any()):
            return f"{part}: largest error {float(error.max()):.2g}, expected {TOLERANCE:g} and {SHARE:g} of the value"
    return ""


def _activations(assessor: Assessor, tokens: int) -> list[Tensor]:
    pipeline = assessor.pipeline
    ids = pipeline.tokenizer.text(text_of(pipeline.tokenizer, tokens)).ids
    (seen,) = pipeline.reader.read([[pipeline.tokenizer.sink_id, *ids]])
    return [seen[p.name][1:].clone() for p in assessor.pack.hook_points]
