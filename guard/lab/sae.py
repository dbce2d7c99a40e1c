"""Whole SAEs as the lab uses them, read from sae-lens folders (`cfg.json`, `sae_weights.safetensors`)."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from guard.errors import InvalidInput


@dataclass(frozen=True)
class FullSae:
    """A latent fires where `x @ enc_rows.T + bias > threshold`; the decoder bias is folded into `bias`."""

    hook_point: str
    enc_rows: Tensor  # [d_sae, d_model]
    bias: Tensor  # [d_sae]
    threshold: Tensor  # [d_sae]
    dec_rows: Tensor  # [d_sae, d_model]

    @property
    def width(self) -> int:
        return len(self.bias)

    def encode(self, x: Tensor) -> Tensor:
        """`x [T, d_model]` -> activations `[T, d_sae]`, dense, float32."""
        pre = torch.addmm(self.bias, x.float(), self.enc_rows.T)
        return torch.where(pre > self.threshold, pre, 0.0)


def load_suite(folder: Path) -> list[FullSae]:
    """Every SAE of a training run, in the order of its report."""
    report = folder / "report.json"
    if not report.exists():
        raise InvalidInput(f"{folder}: holds no report.json; train with `guard lab train` to its end")
    return [load_sae(folder / entry["hook_point"], entry["hook_point"]) for entry in json.loads(report.read_text())]


def load_sae(folder: Path, hook_point: str) -> FullSae:
    """Raises InvalidInput for an architecture whose gate does not depend on a latent's own row alone."""
    config = json.loads((folder / "cfg.json").read_text())
    if config["architecture"] != "jumprelu":
        raise InvalidInput(f"{folder}: architecture: found {config['architecture']!r}, expected 'jumprelu'")
    weights = load_file(folder / "sae_weights.safetensors")
    enc_rows = weights["W_enc"].T.contiguous()
    shift = weights["b_dec"] @ weights["W_enc"] if config["apply_b_dec_to_input"] else 0.0
    return FullSae(
        hook_point=hook_point,
        enc_rows=enc_rows,
        bias=weights["b_enc"] - shift,
        threshold=weights["threshold"],
        dec_rows=weights["W_dec"],
    )
