"""Narrow: a suite's rows of some latents alone, small enough to keep and to carry to where heads are fitted."""

import shutil
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from guard.errors import InvalidInput
from guard.lab.explain.gather import gather
from guard.lab.explain.records import EXPLANATIONS, Explanation, read, write
from guard.lab.explain.scores import SCORES, LatentScores
from guard.lab.suite.config import ACTIVATIONS
from guard.lab.suite.measure import read_reports, write_reports
from guard.lab.suite.sae import check_replaceable, load_suite, save_rows

Latent = tuple[str, int]  # its SAE's name, and its number there


def narrow(saes: Path, latents: Collection[Latent], out: Path) -> None:
    """Writes to `out` what `fit`, `evaluate` and `build` read of these latents' SAEs, with their rows alone.

    Latents keep their numbers; decoders are left out, and so are SAEs of which no latent is kept. Raises InvalidInput
    for an SAE of which a few rows do not say what they say in the whole, for one without statistics, for a latent that
    it does not hold, and for an `out` that holds whole SAEs.
    """
    check_replaceable(out, [saes])
    kept = defaultdict(list)
    for name, number in sorted(latents):
        kept[name].append(number)
    for sae in load_suite(saes, list(kept)):
        if not sae.subset_exact:
            raise InvalidInput(f"{sae.name}: found topk, expected batch_topk or jumprelu: a few rows are kept alone")
        statistics = saes / sae.name / "stats.npz"
        if not statistics.exists():
            raise InvalidInput(f"{statistics}: absent; run `guard lab fit --only-choose` with --activations first")
        if strangers := set(kept[sae.name]) - set(sae.speaking.tolist()):
            raise InvalidInput(f"{sae.name}: found latent {min(strangers)} to keep, expected one that can fire")
        mine = torch.tensor(kept[sae.name], dtype=torch.int64)
        rows = sae.rows(mine)
        save_rows(out / sae.name, sae.width, mine, enc_rows=rows.enc_rows, bias=rows.bias, threshold=rows.threshold)
        shutil.copyfile(statistics, out / sae.name / "stats.npz")
    for name in (EXPLANATIONS, SCORES):
        (out / name).unlink(missing_ok=True)  # of what stood here before
    for name in ("suite.toml", ACTIVATIONS):
        if (saes / name).exists():
            shutil.copyfile(saes / name, out / name)
    write_reports(out, [report for report in read_reports(saes) or [] if report.name in kept])


def held(explained: Path, scores: Sequence[Path], least: float, *, in_domains: bool) -> set[Latent]:
    """The latents whose explanation scored `least`; of them those that belong to a domain, where that is asked.

    Raises InvalidInput as `gather` does.
    """
    found, _ = gather(explained, scores, least)
    return {(one.sae, one.latent) for one in found if one.domains or not in_domains}


def carry(explained: Path, scores: Sequence[Path], latents: Collection[Latent], out: Path) -> None:
    """Writes to `out` what was said of these latents, and what tested it: what `fit` and `join` read."""
    said = read(explained / EXPLANATIONS, Explanation)
    tested = [line for run in scores for line in read(run / SCORES, LatentScores)]
    write(out / EXPLANATIONS, [line for line in said if (line.sae, line.number) in latents])
    write(out / SCORES, [line for line in tested if (line.sae, line.number) in latents])
