"""Random rows, an encoder held against a float64 product of them, and what shows a kernel that cheats."""

from contextlib import contextmanager
from dataclasses import replace

import torch

from guard.kernels import launch
from guard.kernels.contract import Encoder, EncodeRows

POISON = -7777
QUIET = "ignore::RuntimeWarning:triton.runtime.interpreter"  # numpy's word on infinities that a test hands in


def make_rows(latents: int, d_model: int, probes: int, seed: int) -> EncodeRows:
    generator = torch.Generator().manual_seed(seed)
    return EncodeRows(
        enc_rows=torch.randn(latents, d_model, generator=generator),
        bias=torch.randn(latents, generator=generator),
        threshold=torch.rand(latents, generator=generator) * d_model**0.5,
        probe_rows=torch.randn(probes, d_model, generator=generator),
        probe_bias=torch.randn(probes, generator=generator),
    )


def rounded(rows: EncodeRows, dtype: torch.dtype) -> EncodeRows:
    enc_rows, probe_rows = rows.enc_rows.to(dtype).float(), rows.probe_rows.to(dtype).float()
    return replace(rows, enc_rows=enc_rows, probe_rows=probe_rows)


def assert_exact(
    encoder: Encoder,
    tokens: int,
    latents: int,
    d_model: int,
    probes: int,
    seed: int,
    *,
    dtype: torch.dtype = torch.float32,
    sized: float = 0.0,
) -> None:
    """`dtype`: what rows and activations are rounded to. `sized`: error allowed as a share of what is rounded last."""
    rows = make_rows(latents, d_model, probes, seed)
    x = torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(seed + 1))
    found = encoder(x, rows)
    x, rows = x.to(dtype), rounded(rows, dtype)
    exact = x.double() @ rows.enc_rows.double().T + rows.bias.double()
    near = (exact - rows.threshold).abs() < 1e-4  # where rounding decides, either answer is right
    fired = torch.zeros(tokens, latents, dtype=torch.bool)
    fired[found.token, found.row] = True
    assert torch.equal(fired | near, (exact > rows.threshold) | near)
    value, above = exact[found.token, found.row], (exact - rows.threshold)[found.token, found.row]
    assert bool(((found.value - value).abs() < 1e-4 * max(1, d_model**0.5) + sized * above).all())
    rms = x.double().square().mean(dim=1, keepdim=True).sqrt()
    probe = x.double() / rms @ rows.probe_rows.double().T
    assert bool(((found.probe - probe - rows.probe_bias).abs() < 1e-3 + sized * probe.abs() + sized * sized).all())
    assert found.probe.shape == (tokens, probes)
    assert found.finite


@contextmanager
def poisoned():
    """Memory that nobody wrote holds NaN, or a number that no row has."""
    original = torch.empty

    def empty(*args, **kwargs):
        made = original(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else POISON)

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = original


@contextmanager
def decoding_up_to(tokens):
    original, launch.DECODE_TOKENS = launch.DECODE_TOKENS, tokens
    try:
        yield
    finally:
        launch.DECODE_TOKENS = original
