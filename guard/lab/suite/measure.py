"""How well a saved SAE holds activations that it was not trained on."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor

from guard.lab import shards
from guard.lab.suite.config import Architecture, SaeSpec
from guard.lab.suite.sae import FullSae

OUTLIER_NORM = 5.0


class Recovered(BaseModel):
    """Cross-entropy (nats a token) of the model with a hook point's output as it is, rebuilt, and at its mean.

    `recovered` is (ablated - sae) / (ablated - model): 1 where the SAE loses nothing.
    """

    model: float
    sae: float
    ablated: float
    recovered: float


class SaeReport(BaseModel):
    """`report.json` lists one for each SAE. All but `tokens_trained` is measured on the held-out shards.

    A few tokens carry a norm a hundred times the median; being easy to rebuild, they make `fvu` look small.
    `fvu_typical` leaves them out (norm over OUTLIER_NORM medians; `outlier_share` of the tokens).
    """

    name: str
    hook_point: str
    architecture: Architecture
    width: int
    l0_target: float
    tokens_trained: int
    fvu: float
    fvu_typical: float
    outlier_share: float
    l0: float
    dead_share: float
    threshold: float  # mean over the latents; 0 for topk
    ce: Recovered | None = None  # None where the harvest kept no token ids
    parts: tuple["SaeReport", ...] = ()  # of SAEs that were joined: each one's own


def read_reports(out: Path) -> list[SaeReport] | None:
    """Of a suite's folder; None where its training has not ended."""
    file = out / "report.json"
    return [SaeReport.model_validate(entry) for entry in json.loads(file.read_text())] if file.exists() else None


def write_reports(out: Path, reports: Sequence[SaeReport]) -> None:
    scratch = out / ".report.tmp"
    scratch.write_text(json.dumps([report.model_dump() for report in reports], indent=1))
    scratch.replace(out / "report.json")


def held_out(activations: Path, hook_point: str, count: int) -> Tensor:
    """Activations of the last `count` shards, `[T, d_model]`, float32."""
    total = shards.described(activations).shard_count
    return shards.load_many(activations, range(total - count, total), [hook_point])[hook_point].float()


@torch.no_grad()
def measure(sae: FullSae, spec: SaeSpec, x_all: Tensor, *, tokens_trained: int) -> SaeReport:
    """In float32, with the thresholds that were learnt."""
    norms = torch.linalg.vector_norm(x_all, dim=1)
    typical = norms < OUTLIER_NORM * norms.median()  # [T]
    missed = torch.empty(len(x_all), device=x_all.device)  # [T] squared error
    fired = 0
    alive = torch.zeros(sae.width, dtype=torch.bool, device=x_all.device)
    for x, part in zip(x_all.split(4096), missed.split(4096), strict=True):
        acts = sae.encode(x)  # [T, d_sae]
        part.copy_((sae.decode(acts) - x).square().sum(dim=1))
        fired += int((acts > 0).sum())
        alive |= (acts > 0).any(dim=0)
    return SaeReport(
        name=spec.name,
        hook_point=spec.hook_point,
        architecture=spec.architecture,
        width=spec.width,
        l0_target=spec.l0,
        tokens_trained=tokens_trained,
        fvu=float(missed.sum() / _spread(x_all)),
        fvu_typical=float(missed[typical].sum() / _spread(x_all[typical])),
        outlier_share=float((~typical).float().mean()),
        l0=fired / len(x_all),
        dead_share=float((~alive).float().mean()),
        threshold=float(sae.threshold.mean()),
    )


def _spread(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().sum()
