"""Reopen: a pack laid out as the stages left it, so that its heads can be fitted to other texts.

A pack holds the rows of the latents that it kept, and neither the others nor any decoder. Its SAEs come back in their
full width, so that latents keep their numbers, with silence wherever the pack holds nothing.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from guard.errors import InvalidInput
from guard.lab.explain.records import EXPLANATIONS, Explanation, write
from guard.lab.explain.scores import SCORES, LatentScores
from guard.lab.suite.config import SuiteConfig, write_config
from guard.lab.suite.measure import SaeReport, write_reports
from guard.lab.suite.sae import check_replaceable, save_rows
from guard.pack.loader import HookPointRows, load_pack
from guard.pack.manifest import EXPLANATION_SCORE, LatentLine


def reopen(pack: Path, out: Path) -> int:
    """Writes what `fit`, `evaluate` and `build` read of SAEs, and the pack's explanations with their scores.

    Returns how many latents there are. Raises InvalidInput where the pack does not say which SAEs it came from, and
    PackError for a pack that does not pass its checks.
    """
    check_replaceable(out)
    opened = load_pack(pack)
    try:
        training = SuiteConfig.model_validate(opened.evaluation["training"])
        reports = [SaeReport.model_validate(report) for report in opened.evaluation["saes"]]
    except (KeyError, ValueError):
        raise InvalidInput(f"{pack}: found no SAEs in its evaluation, expected a pack of `guard lab build`") from None
    named = {report.hook_point: report for report in reports}
    if strangers := [point.name for point in opened.hook_points if point.name not in named]:
        raise InvalidInput(f"{pack}: found no SAE of {strangers[0]} in its evaluation, expected one of each hook point")
    out.mkdir(parents=True, exist_ok=True)
    write_config(out / "suite.toml", training)
    for point in opened.hook_points:
        folder = out / named[point.name].name
        save_rows(
            folder,
            named[point.name].width,
            torch.from_numpy(point.latents),
            enc_rows=torch.from_numpy(point.enc_rows),
            bias=torch.from_numpy(point.bias),
            threshold=torch.from_numpy(point.threshold),
        )
        lines = [line for line in opened.latents if line.hook_point == point.name]
        _write_statistics(folder, point, lines, named[point.name].width)
    said = opened.manifest.explanations
    told = [line for line in opened.latents if said and line.explanation]
    write(out / EXPLANATIONS, [
        Explanation(
            latent=f"{line.hook_point}/{line.latent}",
            sae=named[line.hook_point].name,
            explanation=line.explanation,
            domains=line.domains,
            subdomains=line.subdomains,
            confidence=0.0,  # a pack does not keep it
            surface_form=line.surface_form,
            annotator=said.annotator,
            prompt=said.explained,
        )
        for line in told if said
    ])  # fmt: skip
    write(out / SCORES, [
        LatentScores(
            latent=f"{line.hook_point}/{line.latent}",
            sae=named[line.hook_point].name,
            scores={name: score for name, score in line.scores.items() if not name.startswith("contrast.")},
            items=0,
            firing=0,
            prompt=said.simulated if EXPLANATION_SCORE in line.scores else "",
        )
        for line in told if said
    ])  # fmt: skip
    # Last: a folder without it is none that stages read.
    write_reports(out, reports)
    return len(opened.latents)


def _write_statistics(folder: Path, point: HookPointRows, lines: list[LatentLine], width: int) -> None:
    def spread(values: list[float] | np.ndarray, otherwise: float) -> np.ndarray:
        result = np.full(width, otherwise, dtype=np.float32)
        result[point.latents] = values
        return result

    found: dict[str, Any] = {
        name: spread([line.quantiles[name] for line in lines], 0.0) for name in (lines[0].quantiles if lines else ())
    }
    found["firing_rate"] = spread([line.firing_rate for line in lines], 0.0)
    found["scale"] = spread(point.scale, 2.0)  # above the silent rows' threshold
    np.savez(folder / "stats.npz", **found)
