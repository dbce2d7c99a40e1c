"""sae-lens's training SAEs with forward passes made lean, about twice as fast on a CPU.

The decoder norms scale the weights, not the `[T, d_sae]` activations, and products run in bfloat16 where the device
has it. Losses are those of sae-lens. An activation here is in units of a decoder row of length one (sae-lens:
`rescale_acts_by_decoder_norm`).
"""

import math
from abc import abstractmethod
from functools import cache

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.jumprelu_sae import JumpReLU, Step
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from guard.lab.suite.config import SaeSpec
from guard.reader.model import pick_dtype


class _Lean(TopKTrainingSAE):
    """What the two that count latents share; the gate says which are kept."""

    @abstractmethod
    def gate(self, pre: Tensor) -> Tensor:
        """Pre-activations `[T, d_sae]` -> activations `[T, d_sae]`."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x = step_input.sae_in
        pre, decoder = _lean_encode(self, x)
        acts = self.gate(pre)
        out = (acts @ decoder).float() + self.b_dec
        losses = {"mse_loss": (out - x).square().sum(dim=1).mean()}
        dead = step_input.dead_neuron_mask
        if dead is not None and bool(dead.any()):
            losses["auxiliary_reconstruction_loss"] = _revive(x - out.detach(), pre, decoder, dead)
        return _output(x, out, acts, pre, losses)


class SuiteBatchTopK(_Lean, BatchTopKTrainingSAE):
    """BatchTopK (arXiv 2412.06410): the batch's `k x T` largest pre-activations are kept.

    They are found by a cut, searched among the values near the last cut only, where sae-lens sorts all of `T x d_sae`.
    What is kept is the same, up to ties at the cut. One threshold is learnt, the moving average of the cut, which makes
    the saved SAE a JumpReLU: whether a latent fires depends on its own row alone, and a subset of rows is exact.
    """

    cut = 0.0
    topk_threshold: Tensor  # a buffer of sae-lens's

    def gate(self, pre: Tensor) -> Tensor:
        self._find_cut(pre.detach())
        return nn.functional.threshold(pre, self.cut, 0.0)

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


class SuiteTopK(_Lean):
    """TopK (arXiv 2406.04093): each token's k largest pre-activations are kept."""

    def gate(self, pre: Tensor) -> Tensor:
        top = pre.topk(self.cfg.k, dim=1, sorted=False)
        return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())


class SuiteJumpReLU(JumpReLUTrainingSAE):
    """JumpReLU (arXiv 2407.14435): a threshold for each latent, and a loss on how many fire.

    The sparsity coefficient is steered by feedback on the L0 of each batch, a proportional and an integral controller.
    With `e = log(L0 / target)`, it is `exp(I) (1 + P e)`, and `I` grows by `G e` at every batch. Where too few
    latents fire it is negative, and thresholds come down again, which reconstruction alone would hardly bring about.
    """

    target = 1.0
    log_coefficient = 0.0

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        with torch.no_grad():
            self.threshold.data.clamp_(min=0.0)  # below zero the gate would pass negative pre-activations
        x = step_input.sae_in
        pre, decoder = _lean_encode(self, x)
        pre = pre.float()  # the gate's slope is a window of `bandwidth`, near bfloat16's resolution
        ste = self.cfg.jumprelu_ste_to_input
        acts = JumpReLU.apply(pre, self.threshold, self.bandwidth, ste)
        out = (acts.to(decoder.dtype) @ decoder).float() + self.b_dec
        l0 = Step.apply(pre, self.threshold, self.bandwidth, ste).sum(dim=1).mean()
        l0_loss = self._steer(float(l0.detach())) * l0
        return _output(x, out, acts, pre, {"mse_loss": (out - x).square().sum(dim=1).mean(), "l0_loss": l0_loss})

    def _steer(self, l0: float) -> float:
        """The coefficient for this batch, on which `l0` latents fire on a token."""
        error = math.log(min(max(l0 / self.target, 0.1), 10.0))
        self.log_coefficient += _INTEGRAL * error
        return math.exp(self.log_coefficient) * (1.0 + _PROPORTIONAL * error)


_PROPORTIONAL, _INTEGRAL = 5.0, 0.02
# Pre-activations are in units of the input (norm sqrt(d_model)), and those that fire of order one: a window narrower
# than this catches too few of them for a threshold to be told where to go.
_BANDWIDTH = 0.5
SuiteSae = SuiteBatchTopK | SuiteTopK | SuiteJumpReLU


def make(spec: SaeSpec, d_model: int) -> SuiteSae:
    """With sae-lens's first weights, drawn from torch's global generator."""
    common = {"d_in": d_model, "d_sae": spec.width, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True}
    if spec.architecture == "batch_topk":
        return SuiteBatchTopK(BatchTopKTrainingSAEConfig(k=spec.l0, **common))
    if spec.architecture == "topk":
        return SuiteTopK(TopKTrainingSAEConfig(k=int(spec.l0), **common))
    sae = SuiteJumpReLU(JumpReLUTrainingSAEConfig(jumprelu_bandwidth=_BANDWIDTH, **common))
    sae.target = spec.l0
    return sae


def _lean_encode(sae: SuiteSae | _Lean, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-activations `[T, d_sae]` and decoder `[d_sae, d_model]` with rows of length one, in the dtype of products."""
    dtype = _product_dtype(x.device.type)
    norm = sae.W_dec.norm(dim=1)  # [d_sae]
    encoder = sae.W_enc * norm
    # b_dec is subtracted as a constant, and its gradient goes by the bias: one row through the encoder, not T of them.
    centre = sae.b_dec.detach()
    bias = sae.b_enc * norm - (sae.b_dec - centre) @ encoder.detach()
    pre = torch.addmm(bias.to(dtype), (x - centre).to(dtype), encoder.to(dtype))
    return pre, (sae.W_dec / norm[:, None]).to(dtype)


@cache
def _product_dtype(device: str) -> torch.dtype:
    """A processor without bfloat16 products takes fifty times as long over them as over those of float32."""
    return pick_dtype("auto") if device == "cpu" else torch.bfloat16


def _revive(missed: Tensor, pre: Tensor, decoder: Tensor, dead: Tensor) -> Tensor:
    """Dead latents learn to rebuild what the living ones missed (arXiv 2406.04093, appendix A.2)."""
    count = int(dead.sum())
    k = min(count, missed.shape[1] // 2)
    # Sizes in steps, filled up with living latents that are never picked: oneDNN keeps what it made for every size of a
    # product, 10 MB each here, and the number of dead latents is another one at almost every batch.
    which = dead.int().argsort(descending=True, stable=True)[: -(-count // _ROOM) * _ROOM]
    top = pre[:, which].masked_fill(~dead[which], -torch.inf).topk(k, dim=1)
    acts = torch.zeros(len(pre), len(which), dtype=pre.dtype, device=pre.device).scatter(1, top.indices, top.values)
    share = min(count / (missed.shape[1] // 2), 1.0)
    return share * (acts @ decoder[which] - missed).float().square().sum(dim=1).mean()


_ROOM = 256


def _output(x: Tensor, out: Tensor, acts: Tensor, pre: Tensor, losses: dict[str, Tensor]) -> TrainStepOutput:
    loss = torch.stack(list(losses.values())).sum()
    return TrainStepOutput(sae_in=x, sae_out=out, feature_acts=acts, hidden_pre=pre, loss=loss, losses=losses)
