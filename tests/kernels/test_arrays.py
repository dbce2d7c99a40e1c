"""The numpy encoder against the reference: same hits, same probes, and no dense matrix of the whole text."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.kernels import arrays
from guard.kernels.arrays import NumpyEncoder
from guard.kernels.contract import EncodeRows
from guard.kernels.reference import ReferenceEncoder
from tests.kernels.exact import make_rows


def in_numpy(rows):
    parts = (rows.enc_rows, rows.bias, rows.threshold, rows.probe_rows, rows.probe_bias)
    return EncodeRows(*(part.numpy() for part in parts))


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 70),
    latents=st.sampled_from([0, 1, 7, 64, 20_000]),  # of 20,000 a block holds 16 tokens
    d_model=st.sampled_from([1, 3, 64, 577]),
    probes=st.integers(0, 3),
    size=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 10_000),
)
def test_it_gives_what_the_reference_gives(tokens, latents, d_model, probes, size, seed):
    rows = make_rows(latents, d_model, probes, seed)
    x = torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(seed + 1)) * size
    found, expected = NumpyEncoder()(x.numpy(), in_numpy(rows)), ReferenceEncoder()(x, rows)
    exact = x.double() @ rows.enc_rows.double().T + rows.bias.double()
    sure = ((exact - rows.threshold).abs() > 1e-4 * size).numpy()  # elsewhere rounding decides
    fired = [np.zeros((tokens, latents), dtype=bool) for _ in range(2)]
    for dense, own in zip(fired, (found, expected), strict=True):
        dense[np.asarray(own.token), np.asarray(own.row)] = True
    assert np.array_equal(fired[0] & sure, fired[1] & sure)
    np.testing.assert_allclose(found.value, exact[found.token, found.row], rtol=1e-4, atol=1e-4 * size * d_model**0.5)
    np.testing.assert_allclose(found.probe, expected.probe, atol=1e-3)
    assert list(zip(found.token, found.row, strict=True)) == sorted(zip(found.token, found.row, strict=True))
    assert (found.value.dtype, found.probe.dtype, found.probe.shape) == (np.float32, np.float32, (tokens, probes))


def test_a_value_at_its_threshold_does_not_fire_and_the_next_float_does():
    above = np.nextafter(np.float32(0.5), np.float32(1))
    one = np.ones((1, 1), np.float32)
    rows = EncodeRows(one, np.zeros(1, np.float32), np.float32([0.5]), np.zeros((0, 1), np.float32), np.float32([]))
    found = NumpyEncoder()(np.float32([[0.5], [above], [-0.5]]), rows)
    assert (found.token.tolist(), found.value.tolist()) == ([1], [above])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2e19, 3e38])
def test_what_is_not_finite_or_would_overflow_spoils_the_whole_reading(bad):
    x = np.ones((9, 16), np.float32)
    x[4, 3] = bad
    found = NumpyEncoder()(x, in_numpy(make_rows(5, 16, 2, 0)))
    assert not found.finite
    assert (len(found.row), found.probe.shape) == (0, (9, 2))


def test_large_values_and_zeros_are_read():
    rows = in_numpy(make_rows(20, 16, 2, 5))
    x = np.stack([np.full(16, 1e18), np.zeros(16)]).astype(np.float32)
    found = NumpyEncoder()(x, rows)
    assert found.finite
    np.testing.assert_allclose(found.probe[0], rows.probe_rows.sum(axis=1) + rows.probe_bias, rtol=1e-4)
    np.testing.assert_allclose(found.probe[1], rows.probe_bias)


def test_it_holds_no_dense_matrix_of_the_whole_text(monkeypatch):
    sizes, hits = [], arrays._hits

    def watched(x, start, rows):
        sizes.append(len(x) * len(rows.enc_rows))
        return hits(x, start, rows)

    monkeypatch.setattr(arrays, "_hits", watched)
    NumpyEncoder()(np.ones((4096, 16), np.float32), in_numpy(make_rows(2048, 16, 1, 0)))
    assert 0 < max(sizes) <= 4096 * 2048 // 16


def test_activations_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"activations: found shape \[3, 8\], expected \[T, 16\]"):
        NumpyEncoder()(np.zeros((3, 8), np.float32), in_numpy(make_rows(2, 16, 0, 0)))
