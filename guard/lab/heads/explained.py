"""Explained latents, as heads and packs take them: what was said of each, and what its explanation scored."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from guard.errors import InvalidInput
from guard.lab.suite.sae import FullSae


class Explained(BaseModel):
    """One latent; `scores` holds those of every run that tested its explanation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sae: str
    latent: int
    explanation: str
    domains: tuple[str, ...]
    subdomains: tuple[str, ...]
    surface_form: bool
    scores: dict[str, float]
    annotator: str
    explained: str  # the versions of the prompts that asked for the explanation,
    simulated: str  # and tested it


def keep(file: Path, explained: Sequence[Explained]) -> None:
    file.write_text("".join(one.model_dump_json() + "\n" for one in explained), encoding="utf-8")


def kept(file: Path) -> list[Explained]:
    return [Explained.model_validate_json(line) for line in file.open(encoding="utf-8")]


def numbered(suite: Sequence[FullSae], explained: Sequence[Explained]) -> dict[int, Explained]:
    """By the latent's number through the suite. Raises InvalidInput for a latent of another suite."""
    starts, offset = {}, 0
    for sae in suite:
        starts[sae.name] = offset
        offset += sae.width
    if strangers := [one for one in explained if one.sae not in starts]:
        raise InvalidInput(f"explained latents: found some of {strangers[0].sae}, expected SAEs of {', '.join(starts)}")
    return {starts[one.sae] + one.latent: one for one in explained}


def mask(suite: Sequence[FullSae], explained: Sequence[Explained]) -> NDArray[np.bool_]:
    """`[K]` over the suite's latents: those that are explained."""
    result = np.zeros(sum(sae.width for sae in suite), dtype=bool)
    result[list(numbered(suite, explained))] = True
    return result
