"""Steps of running answers, several of them read as one.

Such a step brings one token a request, and what its encode, its message and its reading in the sidecar cost hardly
depends on how many tokens these hold. So steps of the same requests wait for each other: a few, and not for long.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LONGEST_WAIT = 0.25  # seconds that a step waits for others at most: an engine may take long for each


@dataclass(frozen=True, slots=True)
class Computed:
    """Tokens that the engine computed, those of each request one behind the other.

    Ids and positions are as the model read them: with asynchronous scheduling only the device knows.
    """

    batch: Sequence[str]  # the engine's ids
    lengths: Sequence[int]  # tokens of each
    ids: Tensor  # [T]
    positions: Tensor  # [T]
    activations: Sequence[Tensor]  # [T, d_model] of each hook point

    def begins(self) -> list[int]:
        """Position of each request's first token."""
        starts = np.cumsum([0, *self.lengths[:-1]])
        return [int(position) for position in self.positions.cpu().numpy()[starts]]

    def token_ids(self) -> NDArray[np.int32]:
        """`[T]`, a copy: the engine uses its buffer again."""
        return self.ids.cpu().numpy().astype(np.int32)


class Gathering:
    """Holds back steps that bring one token a request, as long as the same requests run."""

    def __init__(self, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`steps`: how many are read together at most."""
        self._steps = steps
        self._clock = clock
        self._waiting: list[Computed] = []
        self._since = 0.0

    def add(self, step: Computed) -> list[Computed]:
        """What is to be read now, in order; `step`, one token a request, may have to wait for others."""
        if self._steps == 1:
            return [step]
        ready = self.take() if self._waiting and list(step.batch) != list(self._waiting[0].batch) else []
        if not self._waiting:
            self._since = self._clock()
        # Copies, as the engine writes the next step's into the same place.
        self._waiting.append(
            Computed(
                step.batch,
                step.lengths,
                step.ids.clone(),
                step.positions.clone(),
                [x.clone() for x in step.activations],
            )
        )
        if len(self._waiting) == self._steps or self._clock() - self._since >= LONGEST_WAIT:
            ready += self.take()
        return ready

    def drop(self) -> None:
        self._waiting = []

    def take(self) -> list[Computed]:
        """What waits; it is forgotten here."""
        waiting, self._waiting = self._waiting, []
        if len(waiting) < 2:
            return waiting
        positions = torch.stack([step.positions for step in waiting], dim=1)  # [B, steps]
        if not bool((positions.diff(dim=1) == 1).all()):  # a request that was taken back and came again meanwhile
            return waiting
        count, steps = positions.shape
        return [
            Computed(
                waiting[0].batch,
                [steps] * count,
                torch.stack([step.ids for step in waiting], dim=1).flatten(),
                positions.flatten(),
                [
                    torch.stack(parts, dim=1).flatten(0, 1)
                    for parts in zip(*(s.activations for s in waiting), strict=True)
                ],
            )
        ]
