"""Train: SAEs over one stream of harvested activations, all of a suite side by side.

The SAEs and their losses are sae-lens's; this module drives them from the shards, so that a suite reads the stream once
and a killed run goes on from its last checkpoint. BatchTopK (arXiv 2412.06410) learns one threshold, which makes the
saved SAE a JumpReLU: whether a latent fires depends on its own row alone, and a subset of rows is exact.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from guard.errors import InvalidInput
from guard.lab import shards


class TrainConfig(BaseModel):
    """`train.json`. Tokens are counted over the stream, which starts again when it has been read through."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hook_points: tuple[str, ...]
    width: int = 4608
    k: int = 40
    tokens: int = 5_000_000
    batch: int = 2048
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    decay_share: float = 0.25
    dead_after_tokens: int = 500_000
    aux_every: int = 4
    shards_mixed: int = 8
    held_out_shards: int = 2
    seed: int = 0


OUTLIER_NORM = 5.0


class SaeReport(BaseModel):
    """How well one SAE holds the activations of the held-out shards.

    A few tokens carry a norm a hundred times the median; being easy to rebuild, they make `fvu` look small.
    `fvu_typical` leaves them out (norm over OUTLIER_NORM medians; `outlier_share` of the tokens).
    """

    hook_point: str
    width: int
    tokens_trained: int
    fvu: float
    fvu_typical: float
    outlier_share: float
    l0: float
    dead_share: float
    threshold: float


Progress = Callable[[int, int, dict[str, float]], None]  # tokens done, tokens in all, FVU of each hook point


class SuiteSAE(BatchTopKTrainingSAE):
    """sae-lens's BatchTopK SAE with a forward pass made lean, about twice as fast on a CPU.

    The decoder norms scale the weights, not the `[T, d_sae]` activations; products run in bfloat16; and the batch's k
    largest pre-activations are found by a cut, searched among the values near the last cut only, where sae-lens sorts
    all of `T x d_sae`. What is kept is the same, up to ties at the cut.
    """

    cut = 0.0
    topk_threshold: Tensor  # a buffer of sae-lens's

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x = step_input.sae_in
        norm = self.W_dec.norm(dim=1)  # [d_sae]
        encoder = (self.W_enc * norm).bfloat16()
        decoder = (self.W_dec / norm[:, None]).bfloat16()
        pre = torch.addmm((self.b_enc * norm).bfloat16(), (x - self.b_dec).bfloat16(), encoder)  # [T, d_sae]
        self._find_cut(pre.detach())
        acts = nn.functional.threshold(pre, self.cut, 0.0)
        out = (acts @ decoder).float() + self.b_dec
        mse = (out - x).square().sum(dim=1).mean()
        losses = {"mse_loss": mse}
        dead = step_input.dead_neuron_mask
        if dead is not None and bool(dead.any()):
            losses["auxiliary_reconstruction_loss"] = self._revive(x - out.detach(), pre, decoder, dead)
        return TrainStepOutput(
            sae_in=x,
            sae_out=out,
            feature_acts=acts,
            hidden_pre=pre,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
        )

    @torch.no_grad()
    def _find_cut(self, pre: Tensor) -> None:
        kept = int(self.cfg.k * len(pre))
        near = pre[pre > 0.8 * self.cut]
        if len(near) < kept:
            near = pre[pre > 0]
        if len(near):
            self.cut = float(near.float().topk(min(kept, len(near)), sorted=False).values.min())
        rate = self.cfg.topk_threshold_lr
        self.topk_threshold = (1 - rate) * self.topk_threshold + rate * self.cut

    def _revive(self, missed: Tensor, pre: Tensor, decoder: Tensor, dead: Tensor) -> Tensor:
        """Dead latents learn to rebuild what the living ones missed (arXiv 2406.04093, appendix A.2)."""
        which = dead.nonzero()[:, 0]
        k = min(len(which), missed.shape[1] // 2)
        top = pre[:, which].topk(k, dim=1)
        acts = torch.zeros(len(pre), len(which), dtype=pre.dtype).scatter(1, top.indices, top.values)
        share = min(len(which) / (missed.shape[1] // 2), 1.0)
        return share * (acts @ decoder[which] - missed).float().square().sum(dim=1).mean()


class _Trainee:
    """One SAE of the suite with its optimiser and its memory of which latents fired."""

    def __init__(self, config: TrainConfig, hook_point: str, d_model: int, scale: float, mean: Tensor) -> None:
        self.config, self.hook_point, self.scale = config, hook_point, scale
        self.sae = SuiteSAE(
            BatchTopKTrainingSAEConfig(
                d_in=d_model, d_sae=config.width, k=config.k, dtype="float32", device="cpu", apply_b_dec_to_input=True
            )
        )
        self.sae.b_dec.data.copy_(mean)
        self.optimiser = torch.optim.Adam(
            self.sae.parameters(), lr=config.learning_rate, betas=(0.9, 0.999), fused=True
        )
        self.silent_for = torch.zeros(config.width)
        self.fvu = float("nan")

    def step(self, x: Tensor, step: int, learning_rate: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate
        dead = self.silent_for > self.config.dead_after_tokens
        out = self.sae.training_forward_pass(
            TrainStepInput(
                sae_in=x * self.scale,
                coefficients={},
                dead_neuron_mask=dead if step % self.config.aux_every == 0 else None,
                n_training_steps=step,
                is_logging_step=False,
            )
        )
        out.loss.backward()
        nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        with torch.no_grad():
            fired = out.feature_acts.amax(dim=0) > 0
            self.silent_for.add_(x.shape[0]).masked_fill_(fired, 0)
            variance = (out.sae_in - out.sae_in.mean(0)).square().sum(1).mean()
            fvu = float(out.losses["mse_loss"].detach() / variance)
            self.fvu = fvu if self.fvu != self.fvu else 0.98 * self.fvu + 0.02 * fvu

    def state(self) -> dict[str, Any]:
        return {
            "sae": self.sae.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "silent_for": self.silent_for,
            "cut": self.sae.cut,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.sae.load_state_dict(state["sae"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.silent_for = state["silent_for"]
        self.sae.cut = state["cut"]


def train(
    config: TrainConfig,
    activations: Path,
    out: Path,
    progress: Progress = lambda _done, _all, _fvu: None,
) -> list[SaeReport]:
    """Trains one SAE a hook point and writes `out/<hook point>/` (sae-lens format) and `out/report.json`.

    Reads the activations in groups of `shards_mixed` shards, shuffled within the group, and saves a checkpoint after
    each, so a killed run loses one group at most. Memory: one group (`shards_mixed` shards in bfloat16) and, for each
    SAE, four copies of its weights.

    Raises InvalidInput where `out` holds a run of another configuration.
    """
    source = shards.described(activations)
    if missing := set(config.hook_points) - set(source.hook_points):
        raise InvalidInput(f"{activations}: holds {', '.join(source.hook_points)}; not {', '.join(sorted(missing))}")
    out.mkdir(parents=True, exist_ok=True)
    _claim(out / "train.json", config)
    torch.manual_seed(config.seed)
    scales = {point: shards.normaliser(activations, point) for point in config.hook_points}
    first = shards.load(activations, 0)
    suite = [
        _Trainee(config, p, source.d_model, scales[p], first[p].float().mean(0) * scales[p]) for p in config.hook_points
    ]
    order = list(range(source.shard_count - config.held_out_shards))
    if not order or min(source.tokens // source.shard_count * config.shards_mixed, config.tokens) < config.batch:
        raise InvalidInput(
            f"{activations}: {source.shard_count} shards of {source.tokens // source.shard_count} tokens are too few "
            f"for batches of {config.batch} with {config.held_out_shards} shards held out"
        )
    groups = [order[i : i + config.shards_mixed] for i in range(0, len(order), config.shards_mixed)]
    steps = config.tokens // config.batch
    step, group = _restore(out, suite)
    while step < steps:
        generator = torch.Generator().manual_seed(config.seed * 100_003 + group)
        mixed = shards.load_many(activations, groups[group % len(groups)], config.hook_points)
        rows = torch.randperm(len(mixed[config.hook_points[0]]), generator=generator)
        for start in range(0, len(rows) - config.batch + 1, config.batch):
            chosen = rows[start : start + config.batch]
            rate = _learning_rate(config, step, steps)
            for trainee in suite:
                trainee.step(mixed[trainee.hook_point][chosen].float(), step, rate)
            step += 1
            if step % 10 == 0 or step == steps:
                progress(step * config.batch, steps * config.batch, {t.hook_point: t.fvu for t in suite})
            if step == steps:
                break
        group += 1
        _save(out, suite, step, group)
    reports = [_finish(t, activations, out, step * config.batch) for t in suite]
    (out / "report.json").write_text(json.dumps([r.model_dump() for r in reports], indent=1))
    return reports


def _learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up, flat, then linear to zero over the last `decay_share` of the run."""
    rise = min(1.0, (step + 1) / config.warmup_steps)
    fall = min(1.0, (steps - step) / max(1.0, config.decay_share * steps))
    return config.learning_rate * rise * fall


def _claim(file: Path, config: TrainConfig) -> None:
    if file.exists() and TrainConfig.model_validate_json(file.read_text()) != config:
        raise InvalidInput(f"{file}: a run of another configuration; choose another --out to start afresh")
    file.write_text(config.model_dump_json(indent=1))


def _save(out: Path, suite: list[_Trainee], step: int, group: int) -> None:
    scratch = out / f".checkpoint-{os.getpid()}.tmp"
    torch.save({"step": step, "group": group, "suite": [t.state() for t in suite], "at": time.time()}, scratch)
    scratch.replace(out / "checkpoint.pt")


def _restore(out: Path, suite: list[_Trainee]) -> tuple[int, int]:
    file = out / "checkpoint.pt"
    if not file.exists():
        return 0, 0
    saved = torch.load(file, weights_only=True)
    for trainee, state in zip(suite, saved["suite"], strict=True):
        trainee.restore(state)
    return int(saved["step"]), int(saved["group"])


def _finish(trainee: _Trainee, activations: Path, out: Path, tokens: int) -> SaeReport:
    """Folds the input scaling in, so that the saved SAE takes raw activations, and measures it on held-out shards."""
    config, sae = trainee.config, trainee.sae
    sae.fold_activation_norm_scaling_factor(trainee.scale)
    folder = out / trainee.hook_point
    sae.save_inference_model(folder)
    report = measure(folder, activations, trainee.hook_point, config.held_out_shards)
    return report.model_copy(update={"tokens_trained": tokens})


@torch.no_grad()
def measure(folder: Path, activations: Path, hook_point: str, held_out_shards: int) -> SaeReport:
    """FVU, L0 and dead share of a saved SAE on the last shards, in fp32 with its learned threshold."""
    from safetensors.torch import load_file

    weights = load_file(folder / "sae_weights.safetensors")
    count = shards.described(activations).shard_count
    held_out = range(count - held_out_shards, count)
    x_all = shards.load_many(activations, list(held_out), [hook_point])[hook_point].float()
    norms = torch.linalg.vector_norm(x_all, dim=1)
    typical = norms < OUTLIER_NORM * norms.median()  # [T]
    missed = torch.empty(len(x_all))  # [T] squared error
    fired = 0.0
    alive = torch.zeros(weights["W_enc"].shape[1], dtype=torch.bool)
    for x, part in zip(x_all.split(4096), missed.split(4096), strict=True):
        pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]  # [T, d_sae]
        acts = torch.where(pre > weights["threshold"], pre, 0.0)
        part.copy_((acts @ weights["W_dec"] + weights["b_dec"] - x).square().sum(dim=1))
        fired += float((acts > 0).sum())
        alive |= (acts > 0).any(dim=0)
    return SaeReport(
        hook_point=hook_point,
        width=len(alive),
        tokens_trained=0,
        fvu=float(missed.sum() / _spread(x_all)),
        fvu_typical=float(missed[typical].sum() / _spread(x_all[typical])),
        outlier_share=float((~typical).float().mean()),
        l0=fired / len(x_all),
        dead_share=float((~alive).float().mean()),
        threshold=float(weights["threshold"].mean()),
    )


def _spread(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().sum()
