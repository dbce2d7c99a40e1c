"""Where a killed run goes on: one file for each SAE in a folder for each step, whole once its marker stands.

Files are by SAE, so that a run may go on with another number of processes.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from guard.lab.suite.ranks import Ranks
from guard.lab.suite.trainee import Trainee

_MARKER = "complete.json"


def save(out: Path, mine: Sequence[Trainee], ranks: Ranks, *, step: int, group: int) -> None:
    """All ranks call this together; the older checkpoints go once the new one is whole."""
    folder = out / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    for trainee in mine:
        torch.save(trainee.state(), folder / f"{trainee.spec.name}.pt")
    ranks.barrier()
    if ranks.first:
        scratch = folder / ".marker"
        scratch.write_text(json.dumps({"step": step, "group": group}))
        scratch.replace(folder / _MARKER)
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other)


def restore(out: Path, mine: Sequence[Trainee]) -> tuple[int, int]:
    """The step and the group of shards that come next; (0, 0) where nothing whole was saved."""
    markers = sorted((out / "checkpoints").glob(f"step-*/{_MARKER}"))
    if not markers:
        return 0, 0
    for trainee in mine:
        file = markers[-1].parent / f"{trainee.spec.name}.pt"
        trainee.restore(torch.load(file, weights_only=True, map_location=trainee.device))
    found = json.loads(markers[-1].read_text())
    return int(found["step"]), int(found["group"])


def discard(out: Path) -> None:
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
