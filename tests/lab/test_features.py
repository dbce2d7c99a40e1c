"""Firing rates and scales of latents, against a plain computation."""

import numpy as np
import pytest
import torch

from guard.lab import shards
from guard.lab.heads.features import latent_stats
from guard.lab.suite.sae import FullSae
from tests.lab.given import POINTS, synthetic_shards


def an_sae(point, d_model=16, width=24, threshold=0.6):
    rows = torch.randn(width, d_model, generator=torch.Generator().manual_seed(1)) / d_model**0.5
    bias = torch.zeros(width)
    bias[0] = -1000.0  # never fires
    return FullSae("an-sae", point, rows, bias, torch.full((width,), threshold), rows)


def test_rates_quantiles_and_scales_of_every_latent(tmp_path):
    synthetic_shards(tmp_path, count=3)
    sae = an_sae(POINTS[0])
    x = torch.cat([shards.load(tmp_path, i)[POINTS[0]] for i in range(3)])
    acts = sae.encode(x).numpy()
    found = latent_stats(sae, tmp_path)
    assert found.firing_rate == pytest.approx((acts > 0).mean(axis=0))
    ordered = [np.sort(acts[acts[:, k] > 0, k]) for k in range(1, sae.width)]
    for q in (0.5, 0.9, 0.99):
        expected = [values[int(q * (len(values) - 1))] for values in ordered]
        assert found.quantiles[str(q)][1:] == pytest.approx(expected, rel=1e-5)
        assert found.quantiles[str(q)][0] == 0
    high = np.array([values[int(0.95 * (len(values) - 1))] for values in ordered])
    floor = 0.5 * np.median(high - 0.6)
    assert found.scale[1:] == pytest.approx(np.maximum(high, 0.6 + floor), rel=1e-5)
    assert found.scale[0] == pytest.approx(0.6 + floor)


def test_a_dense_sae_is_read_on_fewer_shards(tmp_path):
    synthetic_shards(tmp_path, count=3)
    sae = an_sae(POINTS[0])
    first = sae.encode(shards.load(tmp_path, 0)[POINTS[0]]) > 0
    found = latent_stats(sae, tmp_path, most_hits=int(first.sum()))
    assert found.firing_rate == pytest.approx(first.float().mean(dim=0).numpy())
