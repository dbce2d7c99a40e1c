"""Join: suites side by side, as if each hook point had one SAE; for packs that draw on several.

A latent fires or not whatever stands beside it, so that latents of several SAEs may be read together. What was trained
on a stream of everything and what was trained on one about the domains name different things.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guard.errors import InvalidInput
from guard.lab.explain.records import EXPLANATIONS, Explanation, read, write
from guard.lab.explain.scores import SCORES, LatentScores
from guard.lab.suite.config import ACTIVATIONS
from guard.lab.suite.measure import SaeReport, read_reports, write_reports
from guard.lab.suite.sae import FullSae, check_replaceable, load_suite, save_rows


def join(folders: Sequence[Path], out: Path) -> int:
    """Writes to `out` what `fit`, `evaluate` and `build` read. Returns how many latents can fire.

    Each folder holds a suite (whole, narrowed, or of a pack that was opened again), with `explanations.jsonl` and
    `scores.jsonl` where its latents were explained; those come along. Latents keep their numbers, with the widths of
    the SAEs before theirs at the hook point added. `suite.toml` is the first suite's.

    Raises InvalidInput for an SAE of which a few rows do not say what they say in the whole, for one without
    statistics, and for an `out` that holds whole SAEs or is one of the folders.
    """
    check_replaceable(out, folders)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InvalidInput("--saes: found a folder twice, expected each once")
    suites = [load_suite(folder) for folder in folders]
    reports = {(f, r.name): r for f in folders for r in read_reports(f) or []}
    out.mkdir(parents=True, exist_ok=True)
    joined: list[SaeReport] = []
    moved: dict[tuple[Path, str], tuple[SaeReport, int]] = {}  # where an SAE's latents went, and what is added to them
    count = 0
    for point in dict.fromkeys(sae.hook_point for suite in suites for sae in suite):
        there = [(f, s) for f, suite in zip(folders, suites, strict=True) for s in suite if s.hook_point == point]
        report = _together([reports[folder, sae.name] for folder, sae in there])
        starts = np.cumsum([0, *(sae.width for _, sae in there)])
        moved |= {(f, sae.name): (report, int(start)) for (f, sae), start in zip(there, starts, strict=False)}
        count += _write(out / report.name, there, starts.tolist())
        joined.append(report)
    shutil.copyfile(folders[0] / "suite.toml", out / "suite.toml")
    for trained_on in [folder / ACTIVATIONS for folder in folders if (folder / ACTIVATIONS).exists()][:1]:
        shutil.copyfile(trained_on, out / ACTIVATIONS)
    if any((folder / EXPLANATIONS).exists() for folder in folders):
        write(out / EXPLANATIONS, _renumbered(folders, EXPLANATIONS, Explanation, moved))
        write(out / SCORES, _renumbered(folders, SCORES, LatentScores, moved))
    write_reports(out, joined)  # last: a folder without it is none that stages read
    return count


def _together(parts: Sequence[SaeReport]) -> SaeReport:
    """Width and L0 add up; what is rebuilt is at least what the better part rebuilds."""
    width = sum(part.width for part in parts)

    def mean(name: str) -> float:
        return float(sum(getattr(part, name) * part.width for part in parts) / width)

    best = min(parts, key=lambda part: part.fvu_typical)
    return best.model_copy(
        update={
            "name": f"{best.hook_point}.joined.w{width}",
            "width": width,
            "l0_target": sum(part.l0_target for part in parts),
            "l0": sum(part.l0 for part in parts),
            "tokens_trained": sum(part.tokens_trained for part in parts),
            "dead_share": mean("dead_share"),
            "threshold": mean("threshold"),
            "parts": tuple(parts),
        }
    )


def _write(folder: Path, there: Sequence[tuple[Path, FullSae]], starts: Sequence[int]) -> int:
    rows, latents, statistics = [], [], []
    for (source, sae), start in zip(there, starts, strict=False):
        if not sae.subset_exact:
            raise InvalidInput(
                f"{sae.name}: found topk, expected batch_topk or jumprelu: a pack holds a few rows alone"
            )
        file = source / sae.name / "stats.npz"
        if not file.exists():
            raise InvalidInput(f"{file}: absent; run `guard lab fit --only-choose` with --activations first")
        statistics.append(np.load(file))
        speaking = sae.speaking
        rows.append(sae.rows(speaking))
        latents.append(speaking + start)
    save_rows(
        folder,
        starts[-1],
        torch.cat(latents),
        enc_rows=torch.cat([part.enc_rows for part in rows]),
        bias=torch.cat([part.bias for part in rows]),
        threshold=torch.cat([part.threshold for part in rows]),
    )
    if len({frozenset(part.files) for part in statistics}) > 1:
        raise InvalidInput(
            f"{there[0][0] / there[0][1].name / 'stats.npz'}: holds other quantiles than the suites beside it"
        )
    together: dict[str, Any] = {name: np.concatenate([part[name] for part in statistics]) for name in statistics[0]}
    np.savez(folder / "stats.npz", **together)
    return sum(map(len, latents))


def _renumbered(
    folders: Sequence[Path],
    name: str,
    kind: type[Explanation] | type[LatentScores],
    moved: dict[tuple[Path, str], tuple[SaeReport, int]],
) -> list[Any]:
    result = []
    for folder in folders:
        for line in read(folder / name, kind) if (folder / name).exists() else []:
            report, start = moved[folder, line.sae]
            latent = line.number + start
            result.append(line.model_copy(update={"sae": report.name, "latent": f"{report.hook_point}/{latent}"}))
    return result
