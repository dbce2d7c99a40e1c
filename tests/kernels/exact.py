"""Random rows, and an encoder held against a float64 product of them."""

import numpy as np
import torch

from guard.kernels.contract import Encoder, EncodeRows


def make_rows(latents: int, d_model: int, probes: int, seed: int) -> EncodeRows:
    generator = torch.Generator().manual_seed(seed)
    return EncodeRows(
        enc_rows=torch.randn(latents, d_model, generator=generator),
        bias=torch.randn(latents, generator=generator),
        threshold=torch.rand(latents, generator=generator) * d_model**0.5,
        probe_rows=torch.randn(probes, d_model, generator=generator),
        probe_bias=torch.randn(probes, generator=generator),
    )


def assert_exact(encoder: Encoder, tokens: int, latents: int, d_model: int, probes: int, seed: int) -> None:
    rows = make_rows(latents, d_model, probes, seed)
    x = torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(seed + 1))
    found = encoder(x, rows)
    exact = x.double() @ rows.enc_rows.double().T + rows.bias.double()
    near = (exact - rows.threshold).abs() < 1e-4  # where rounding decides, either answer is right
    fired = torch.zeros(tokens, latents, dtype=torch.bool)
    fired[found.token, found.row] = True
    assert torch.equal(fired | near, (exact > rows.threshold) | near)
    np.testing.assert_allclose(found.value, exact[found.token, found.row], atol=1e-4 * max(1, d_model**0.5))
    direction = x.double() / x.double().square().mean(dim=1, keepdim=True).sqrt()
    np.testing.assert_allclose(found.probe, direction @ rows.probe_rows.double().T + rows.probe_bias, atol=1e-3)
    assert found.probe.shape == (tokens, probes)
    assert found.finite
