"""The processes that train a suite together under `torchrun`; without it there is one.

They exchange no gradients, only agreement on when to save and what to report: each SAE is trained by one of them.
"""

import datetime as dt
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

from guard.lab.suite.config import SaeSpec

T = TypeVar("T")
_PATIENCE = dt.timedelta(hours=12)  # the slowest may be as late as its share is larger


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            distributed.barrier()

    def agree(self, *, said: bool) -> bool:
        """What the first of them says."""
        if self.size == 1:
            return said
        box = [said]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, mine: T) -> list[T]:
        """Everyone's, in order of rank; the same for all."""
        if self.size == 1:
            return [mine]
        boxes: list[T | None] = [None] * self.size
        distributed.all_gather_object(boxes, mine)
        return boxes  # type: ignore[return-value]  # all of them are filled now


@contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the group that `torchrun` describes in the environment, if it does, and leaves it at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()


def device() -> torch.device:
    """This process's own GPU if the machine has one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def deal(specs: Sequence[SaeSpec], size: int) -> list[list[SaeSpec]]:
    """The SAEs of each rank: the widest first, each to whoever has the least width so far."""
    load = [0] * size
    dealt: list[list[SaeSpec]] = [[] for _ in range(size)]
    for spec in sorted(specs, key=lambda spec: -spec.width):
        rank = load.index(min(load))
        load[rank] += spec.width
        dealt[rank].append(spec)
    order = list(specs)
    return [sorted(mine, key=order.index) for mine in dealt]
