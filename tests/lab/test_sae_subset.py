"""A pack's few rows say exactly what the whole SAE says of them: what makes encoding a subset sound."""

import pytest
import torch

from guard.kernels import choice
from guard.kernels.contract import EncodeRows
from guard.lab import shards
from guard.lab.suite.config import Grid, SuiteConfig
from guard.lab.suite.sae import FullSae, load_suite
from guard.lab.suite.train import train
from tests.lab.given import synthetic_shards


def subset(sae: FullSae, picked: torch.Tensor) -> EncodeRows:
    return EncodeRows(
        enc_rows=sae.enc_rows[picked].contiguous(),
        bias=sae.bias[picked],
        threshold=sae.threshold[picked],
        probe_rows=torch.zeros(0, sae.enc_rows.shape[1]),
        probe_bias=torch.zeros(0),
    )


def dense(found, tokens: int, rows: int) -> torch.Tensor:
    result = torch.zeros(tokens, rows)
    result[found.token, found.row] = found.value
    return result


def random_sae(width: int, d_model: int) -> FullSae:
    """Rows of unit length over activations of norm sqrt(d_model), a few in a hundred firing."""
    generator = torch.Generator().manual_seed(width)
    rows = torch.nn.functional.normalize(torch.randn(width, d_model, generator=generator), dim=1)
    bias = torch.randn(width, generator=generator)
    threshold = 1.5 + torch.rand(width, generator=generator)
    return FullSae("h", "h", rows, bias, threshold, rows)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("width", "d_model", "kept"), [(4608, 576, 300), (513, 64, 1), (1000, 577, 1000)])
def test_picked_rows_fire_as_they_do_in_the_whole_sae(backend, width, d_model, kept):
    sae = random_sae(width, d_model)
    generator = torch.Generator().manual_seed(7)
    picked = torch.randperm(width, generator=generator)[:kept].sort().values
    x = torch.randn(301, d_model, generator=generator)
    whole = sae.encode(x)[:, picked]
    part = dense(choice.choose(backend)(x, subset(sae, picked)), len(x), kept)
    assert torch.equal(part != 0, whole != 0)
    assert (part - whole).abs().max() < 1e-4
    assert (whole != 0).any()


def test_the_same_for_a_trained_sae_and_its_own_activations(tmp_path):
    activations = synthetic_shards(tmp_path / "activations", hook_points=("h",), count=3)
    grid = Grid(hook_points=("h",), widths=(64,), l0=(4,))
    config = SuiteConfig(grid=(grid,), tokens=1600, batch=32, shards_mixed=2, held_out_shards=1)
    train(config, activations, tmp_path / "saes")
    (sae,) = load_suite(tmp_path / "saes")
    x = shards.load(activations, 2)["h"]
    picked = torch.arange(1, 64, 3)
    whole = sae.encode(x)[:, picked]
    part = dense(choice.choose("cpu")(x, subset(sae, picked)), len(x), len(picked))
    assert torch.equal(part != 0, whole != 0)
    assert (part - whole).abs().max() < 1e-4
    assert (whole != 0).any()
