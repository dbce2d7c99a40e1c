"""One SAE of a suite while it is trained: its weights, its optimiser, its memory of which latents fired."""

from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file
from torch import Tensor, nn

from guard.lab.suite.architectures import SuiteBatchTopK, SuiteJumpReLU, make
from guard.lab.suite.config import SaeSpec, SuiteConfig

# Adam moves a parameter by its learning rate at most, and a threshold has farther to go than a weight.
_THRESHOLD_HASTE = 10.0
_SMOOTH = 0.02


class Trainee:
    """Activations come to it scaled (`shards.normaliser`); what it saves takes them as they are."""

    def __init__(
        self, spec: SaeSpec, config: SuiteConfig, scale: float, mean: Tensor, device: torch.device | None = None
    ) -> None:
        """`mean [d_model]`, of scaled activations, is the first decoder bias."""
        self.spec, self.config, self.scale = spec, config, scale
        self.device = device or torch.device("cpu")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed(config.seed))
            self.sae = make(spec, len(mean))
        self.sae.b_dec.data.copy_(mean)
        self.sae.to(self.device)
        named = dict(self.sae.named_parameters())
        hasty = [named.pop("threshold")] if "threshold" in named else []
        groups = [{"params": list(named.values()), "haste": 1.0}, {"params": hasty, "haste": _THRESHOLD_HASTE}]
        self.optimiser = torch.optim.Adam(
            [group for group in groups if group["params"]], lr=config.learning_rate, betas=(0.9, 0.999), fused=True
        )
        self.silent_for = torch.zeros(spec.width, device=self.device)  # [d_sae] tokens
        self.tokens_before = 0
        self.fvu = float("nan")

    def step(self, x: Tensor, step: int, learning_rate: float) -> None:
        """One batch of scaled activations `[T, d_model]`, float32."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate * group["haste"]
        dead = self.silent_for > self.config.dead_after_tokens
        out = self.sae.training_forward_pass(
            TrainStepInput(
                sae_in=x,
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
            variance = (x - x.mean(0)).square().sum(1).mean()
            fvu = float(out.losses["mse_loss"].detach() / variance)
            self.fvu = fvu if self.fvu != self.fvu else (1 - _SMOOTH) * self.fvu + _SMOOTH * fvu

    def state(self) -> dict[str, Any]:
        return {
            "sae": self.sae.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "silent_for": self.silent_for,
            "steering": getattr(self.sae, self._steering) if self._steering else 0.0,
            "tokens_before": self.tokens_before,
            "fvu": self.fvu,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.sae.load_state_dict(state["sae"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.silent_for = state["silent_for"].to(self.device)
        if self._steering:
            setattr(self.sae, self._steering, state["steering"])
        self.tokens_before = state["tokens_before"]
        self.fvu = state["fvu"]

    @property
    def _steering(self) -> str:
        """What the SAE keeps beside its tensors."""
        return {"batch_topk": "cut", "jumprelu": "log_coefficient", "topk": ""}[self.spec.architecture]

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Writes `cfg.json` and `sae_weights.safetensors` (sae-lens, inference); the SAE is spent by it.

        The scale and the decoder's norms are folded in: raw activations, decoder rows of length one.
        """
        sae = self.sae.cpu()
        if isinstance(sae, SuiteJumpReLU):
            sae.threshold.data /= sae.W_dec.norm(dim=1)
        sae.fold_activation_norm_scaling_factor(self.scale)
        if isinstance(sae, SuiteJumpReLU):
            sae.fold_W_dec_norm()
        sae.save_inference_model(folder)

    @torch.no_grad()
    def start_from(self, folder: Path, tokens_before: int) -> None:
        """Takes up the weights that `save` left in `folder`; the inverse of the foldings there.

        How long the decoder's rows were before is not known, and does not matter to what the SAE says: encoder and
        decoder are given the same length, as they have when training starts.
        """
        saved = load_file(folder / "sae_weights.safetensors")
        encoder = saved["W_enc"] / saved["W_dec"].norm(dim=1)  # for decoder rows of length one, as they nearly are
        decoder = nn.functional.normalize(saved["W_dec"], dim=1)
        length = encoder.norm(dim=0).sqrt().clamp(min=1e-6)  # [d_sae]
        self.sae.W_enc.data.copy_(encoder / length)
        self.sae.W_dec.data.copy_(decoder * length[:, None])
        self.sae.b_enc.data.copy_(saved["b_enc"] * self.scale / length)
        self.sae.b_dec.data.copy_(saved["b_dec"] * self.scale)
        if isinstance(self.sae, SuiteBatchTopK):
            self.sae.cut = float(saved["threshold"].mean()) * self.scale
            self.sae.topk_threshold.fill_(self.sae.cut)
        elif isinstance(self.sae, SuiteJumpReLU):
            self.sae.threshold.data.copy_(saved["threshold"] * self.scale)
        self.tokens_before = tokens_before
