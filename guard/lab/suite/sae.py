"""Whole SAEs as the lab uses them, read from sae-lens folders (`cfg.json`, `sae_weights.safetensors`)."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from guard.errors import InvalidInput


@dataclass(frozen=True)
class FullSae:
    """A latent fires where `x @ enc_rows.T + bias > threshold`; the decoder bias is folded into `bias`.

    With `k` it must also be among its token's k largest, and the threshold is zero.
    """

    name: str  # its folder in the training run
    hook_point: str
    enc_rows: Tensor  # [d_sae, d_model]
    bias: Tensor  # [d_sae]
    threshold: Tensor  # [d_sae]
    dec_rows: Tensor  # [d_sae, d_model]
    dec_bias: Tensor = field(default_factory=lambda: torch.zeros(()))  # [d_model]
    k: int = 0

    @property
    def width(self) -> int:
        return len(self.bias)

    @property
    def speaking(self) -> Tensor:
        """The latents that can fire: of a suite that holds a few rows alone, these."""
        return (self.enc_rows.any(dim=1) | (self.bias > self.threshold)).nonzero()[:, 0]

    @property
    def subset_exact(self) -> bool:
        """Whether a few of its rows alone say what they say in the whole; a pack may hold no other SAE."""
        return self.k == 0

    def encode(self, x: Tensor) -> Tensor:
        """`x [T, d_model]` -> activations `[T, d_sae]`, dense, float32."""
        pre = torch.addmm(self.bias, x.float(), self.enc_rows.T)
        if self.k:
            top = pre.topk(self.k, dim=1, sorted=False)
            return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        return torch.where(pre > self.threshold, pre, 0.0)

    def decode(self, acts: Tensor) -> Tensor:
        """Activations `[T, d_sae]` -> what they say `x` was, `[T, d_model]`."""
        return acts @ self.dec_rows + self.dec_bias

    def rows(self, chosen: Tensor) -> "FullSae":
        """Of these latents alone `[n]`, in their order; of a topk SAE they may say more than in the whole."""
        names = ("enc_rows", "bias", "threshold", "dec_rows")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

    def to(self, device: torch.device) -> "FullSae":
        names = ("enc_rows", "bias", "threshold", "dec_rows", "dec_bias")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def load_suite(folder: Path, names: Collection[str] | None = None) -> list[FullSae]:
    """The SAEs of a training run, all or those that are named, in the order of its report.

    Raises InvalidInput for a run that has not ended, and for a name that it does not hold.
    """
    report = folder / "report.json"
    if not report.exists():
        raise InvalidInput(f"{folder}: holds no report.json; train with `guard lab train` to its end")
    hook_points = {e.get("name", e["hook_point"]): e["hook_point"] for e in json.loads(report.read_text())}
    if names is not None and (missing := [name for name in names if name not in hook_points]):
        raise InvalidInput(f"{report}: holds no SAE {', '.join(missing)}")
    return [load_sae(folder / n, point) for n, point in hook_points.items() if names is None or n in names]


def load_sae(folder: Path, hook_point: str) -> FullSae:
    """Raises InvalidInput for an architecture other than jumprelu (which batch_topk is saved as) and topk."""
    config = json.loads((folder / "cfg.json").read_text())
    if config["architecture"] not in {"jumprelu", "topk"}:
        raise InvalidInput(f"{folder}: architecture: found {config['architecture']!r}, expected 'jumprelu' or 'topk'")
    weights = load_file(folder / "sae_weights.safetensors")
    if "latents" in weights:
        weights = _in_full_width(weights, config["d_sae"])
    # sae-lens's topk may weigh its activations by the length of the decoder's rows.
    rescaled = config.get("rescale_acts_by_decoder_norm", False)
    norm = weights["W_dec"].norm(dim=1) if rescaled else torch.ones(len(weights["b_enc"]))
    shift = weights["b_dec"] @ weights["W_enc"] if config["apply_b_dec_to_input"] else 0.0
    return FullSae(
        name=folder.name,
        hook_point=hook_point,
        enc_rows=(weights["W_enc"] * norm).T.contiguous(),
        bias=(weights["b_enc"] - shift) * norm,
        threshold=weights["threshold"] if "threshold" in weights else torch.zeros(len(norm)),
        dec_rows=weights["W_dec"] / norm[:, None],
        dec_bias=weights["b_dec"],
        k=int(config["k"]) if config["architecture"] == "topk" else 0,
    )


def check_replaceable(out: Path, read: Sequence[Path] = ()) -> None:
    """Raises InvalidInput where rows written to `out` would replace what is `read`, or SAEs that somebody trained."""
    if out.resolve() in {folder.resolve() for folder in read}:
        raise InvalidInput(f"{out}: is read and would be written to; give another folder as --out")
    for file in out.glob("*/sae_weights.safetensors"):
        with safe_open(file, "pt") as there:
            if "latents" not in there.keys():  # noqa: SIM118 - not a mapping, keys() is all it has
                raise InvalidInput(f"{out}: holds the whole SAE {file.parent.name}; give another folder as --out")


def save_rows(folder: Path, width: int, latents: Tensor, *, enc_rows: Tensor, bias: Tensor, threshold: Tensor) -> None:
    """Writes what `load_sae` reads as an SAE of this width whose other latents are silent, with no decoder.

    `latents [n]`, `enc_rows [n, d_model]`, `bias [n]` (a decoder's bias folded in), `threshold [n]`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {"W_enc": enc_rows.T.contiguous(), "b_enc": bias.contiguous(), "threshold": threshold.contiguous()}
    save_file(rows | {"latents": latents}, folder / "sae_weights.safetensors")
    config = {"architecture": "jumprelu", "d_in": enc_rows.shape[1], "d_sae": width, "apply_b_dec_to_input": False}
    (folder / "cfg.json").write_text(json.dumps(config, indent=1))


def _in_full_width(rows: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    latents, d_model = rows["latents"], len(rows["W_enc"])
    return {
        "W_enc": torch.zeros(d_model, width).index_copy(1, latents, rows["W_enc"]),
        "b_enc": torch.zeros(width).index_copy(0, latents, rows["b_enc"]),
        "threshold": torch.ones(width).index_copy(0, latents, rows["threshold"]),  # above what a silent row says
        "W_dec": torch.zeros(width, d_model),
        "b_dec": torch.zeros(d_model),
    }
