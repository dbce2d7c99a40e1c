"""Narrow: a suite's rows of some latents alone, small enough to keep and to carry to where heads are fitted."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from guard.errors import InvalidInput
from guard.lab.suite.measure import read_reports, write_reports
from guard.lab.suite.sae import load_suite, save_rows


def narrow(saes: Path, latents: Mapping[str, Sequence[int]], out: Path) -> None:
    """Writes to `out` what `fit`, `evaluate` and `build` read of the SAEs in `latents`, by name, with these rows alone.

    Latents keep their numbers; decoders are left out, and so are SAEs that are not named. Raises InvalidInput for an
    SAE of which a few rows do not say what they say in the whole, and for one without statistics.
    """
    for sae in load_suite(saes, list(latents)):
        if not sae.subset_exact:
            raise InvalidInput(f"{sae.name}: found topk, expected batch_topk or jumprelu: a few rows are kept alone")
        statistics = saes / sae.name / "stats.npz"
        if not statistics.exists():
            raise InvalidInput(f"{statistics}: absent; run `guard lab fit --only-choose` with --activations first")
        kept = torch.tensor(sorted(latents[sae.name]), dtype=torch.int64)
        rows = sae.rows(kept)
        save_rows(out / sae.name, sae.width, kept, enc_rows=rows.enc_rows, bias=rows.bias, threshold=rows.threshold)
        shutil.copyfile(statistics, out / sae.name / "stats.npz")
    shutil.copyfile(saes / "suite.toml", out / "suite.toml")
    write_reports(out, [report for report in read_reports(saes) or [] if report.name in latents])
