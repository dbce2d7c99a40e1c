"""Gather: the latents whose explanations held, ready for heads to choose among."""

from collections.abc import Sequence
from pathlib import Path

from guard.errors import InvalidInput
from guard.lab.explain.records import EXPLANATIONS, Explanation, read
from guard.lab.explain.scores import SCORES, LatentScores
from guard.lab.heads.explained import Explained
from guard.pack.manifest import EXPLANATION_SCORE


def gather(explained: Path, runs: Sequence[Path], least: float) -> tuple[list[Explained], int]:
    """The latents whose explanation scores `least` at the segment level, and how many were dropped.

    `explained` is the folder of `guard lab explain`, `runs` those of `guard lab simulate` and `judge`; where two have a
    score of one name, the run named first speaks. A latent that no run could test is dropped: nothing is known of its
    explanation. Raises InvalidInput where no run has the score, or no latent is left.
    """
    lines: dict[tuple[str, str], list[LatentScores]] = {}
    for line in (line for run in runs for line in read(run / SCORES, LatentScores)):
        lines.setdefault((line.sae, line.latent), []).append(line)
    if not any(EXPLANATION_SCORE in line.scores for tested in lines.values() for line in tested):
        raise InvalidInput(f"{', '.join(map(str, runs))}: found no {EXPLANATION_SCORE} of any latent")
    explanations = read(explained / EXPLANATIONS, Explanation)
    found = [_explained(e, lines.get((e.sae, e.latent), [])) for e in explanations]
    held = [one for one in found if one.scores.get(EXPLANATION_SCORE, -1.0) >= least]
    if not held:
        raise InvalidInput(f"{explained}: found no latent whose explanation scores {least:g}")
    return held, len(found) - len(held)


def _explained(said: Explanation, tested: Sequence[LatentScores]) -> Explained:
    return Explained(
        sae=said.sae,
        latent=said.number,
        explanation=said.explanation,
        domains=said.domains,
        subdomains=said.subdomains,
        surface_form=said.surface_form,
        scores={name: value for line in reversed(tested) for name, value in line.scores.items()},
        annotator=said.annotator,
        explained=said.prompt,
        simulated=next((line.prompt for line in tested if EXPLANATION_SCORE in line.scores), ""),
    )
