"""Every encoder against a float64 product, on odd sizes, at and around thresholds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.errors import ConfigError
from guard.kernels import choice
from guard.kernels.contract import EncodeRows
from tests.kernels.exact import assert_exact, make_rows

ENCODERS = ("reference", "cpu", "triton")


@pytest.mark.parametrize("name", ["reference", "cpu"])  # triton: test_fused.py, with fewer examples
@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 70),
    latents=st.sampled_from([0, 1, 7, 64, 513]),
    d_model=st.sampled_from([1, 3, 64, 577]),
    probes=st.integers(0, 3),
    seed=st.integers(0, 10_000),
)
def test_hits_and_probes_equal_a_double_precision_product(name, tokens, latents, d_model, probes, seed):
    assert_exact(choice.choose(name), tokens, latents, d_model, probes, seed)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_value_at_its_threshold_does_not_fire_and_the_next_float_does(name):
    threshold = 0.5
    above = float(np.nextafter(np.float32(threshold), np.float32(1)))
    rows = EncodeRows(
        enc_rows=torch.tensor([[1.0]]),
        bias=torch.zeros(1),
        threshold=torch.tensor([threshold]),
        probe_rows=torch.zeros(0, 1),
        probe_bias=torch.zeros(0),
    )
    found = choice.choose(name)(torch.tensor([[threshold], [above], [threshold - 1]]), rows)
    assert found.token.tolist() == [1]
    assert found.value.tolist() == [above]


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_spoils_the_whole_reading(name, bad):
    x = torch.randn(9, 16)
    x[4, 3] = bad
    found = choice.choose(name)(x, make_rows(5, 16, 2, 0))
    assert not found.finite
    assert len(found.row) == 0


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("size", [2e19, 1e30, 3e38])
def test_finite_values_that_would_overflow_are_not_taken_for_silence(name, size):
    rows = EncodeRows(
        enc_rows=torch.tensor([[1.0, 1.0, 1.0, -2.0]]) * 4,  # in float32: infinity less infinity
        bias=torch.zeros(1),
        threshold=torch.ones(1),
        probe_rows=torch.ones(1, 4),  # and the root mean square: infinity
        probe_bias=torch.zeros(1),
    )
    found = choice.choose(name)(torch.tensor([[1.0, 1.0, 1.0, 1.0], [size, size, size, size]]), rows)
    assert not found.finite
    assert len(found.row) == 0


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("size", [1e4, 1e12, 1e18])
def test_large_values_that_float32_holds_are_read(name, size):
    rows = make_rows(20, 16, 2, 5)
    direction = torch.randn(3, 16, generator=torch.Generator().manual_seed(6))
    found = choice.choose(name)(direction * size, rows)
    wanted = (direction.double() @ rows.enc_rows.double().T > rows.threshold / size).nonzero()
    assert found.finite
    assert torch.stack([found.token, found.row], dim=1).tolist() == wanted.tolist()
    np.testing.assert_allclose(found.probe, choice.choose(name)(direction, rows).probe, atol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_are_multiplied_in_float32(name, dtype):
    rows = make_rows(100, 64, 1, 3)
    x = torch.randn(33, 64).to(dtype)
    found = choice.choose(name)(x, rows)
    exact = choice.choose("reference")(x.float(), rows)
    assert torch.equal(found.row, exact.row)
    np.testing.assert_allclose(found.value, exact.value, atol=1e-4)


def test_the_cpu_encoder_holds_no_dense_matrix_of_the_whole_text():
    tokens, latents, d_model = 4096, 2048, 16
    rows = make_rows(latents, d_model, 1, 0)
    rows = EncodeRows(rows.enc_rows, rows.bias, rows.threshold + 100, rows.probe_rows, rows.probe_bias)
    largest = 0
    original = torch.addmm

    def watched(*args, **kwargs):
        nonlocal largest
        result = original(*args, **kwargs)
        largest = max(largest, result.numel())
        return result

    torch.addmm = watched
    try:
        choice.choose("cpu")(torch.randn(tokens, d_model), rows)
    finally:
        torch.addmm = original
    assert 0 < largest <= tokens * latents // 16


@pytest.mark.parametrize("name", ENCODERS)
def test_activations_of_another_model_are_refused(name):
    with pytest.raises(ValueError, match=r"activations: found shape \[3, 8\], expected \[T, 16\]"):
        choice.choose(name)(torch.zeros(3, 8), make_rows(2, 16, 0, 0))


def test_an_unknown_backend_is_named():
    with pytest.raises(
        ConfigError, match=r"encode\.backend: found 'gpu', expected one of auto, cpu, reference, triton"
    ):
        choice.choose("gpu")
