"""Every encoder against a float64 product, on odd sizes, at and around thresholds."""

import gc
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from guard.errors import ConfigError
from guard.kernels import choice
from guard.kernels.contract import EncodeRows
from guard.kernels.cpu import CpuEncoder
from tests.kernels.exact import assert_exact, make_rows, rounded


def bf16_here():
    try:
        CpuEncoder(torch.bfloat16)
    except ConfigError:
        return False
    return True


ENCODERS = ("reference", "cpu", "triton")
BF16 = pytest.param("cpu-bf16", marks=pytest.mark.skipif(not bf16_here(), reason="no bfloat16 instructions here"))
EVERY = (*ENCODERS, BF16)


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


@pytest.mark.parametrize("name", [BF16])
@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 70),
    latents=st.sampled_from([0, 1, 7, 64, 513]),
    d_model=st.sampled_from([1, 3, 64, 577]),
    probes=st.integers(0, 3),
    seed=st.integers(0, 10_000),
)
def test_bf16_hits_are_those_of_an_exact_product_of_the_rounded_operands(name, tokens, latents, d_model, probes, seed):
    encoder = choice.choose(name)
    assert_exact(encoder, tokens, latents, d_model, probes, seed, dtype=torch.bfloat16, sized=2**-7)


@pytest.mark.parametrize("name", [BF16])
def test_bf16_hits_differ_from_float32_only_near_the_threshold(name):
    rows = make_rows(400, 576, 3, 0)
    x = torch.randn(300, 576, generator=torch.Generator().manual_seed(1))
    pre = x @ rows.enc_rows.T + rows.bias
    found = choice.choose(name)(x, rows)
    fired = torch.zeros(pre.shape, dtype=torch.bool)
    fired[found.token, found.row] = True
    wrong = fired != (pre > rows.threshold)
    near = (pre - rows.threshold).abs() < 0.02 * 576**0.5  # 2% of a pre-activation's standard deviation
    assert not bool((wrong & ~near).any())
    assert int(wrong.sum()) < 0.005 * int(fired.sum())


@pytest.mark.parametrize("name", [BF16])
def test_bf16_fires_above_its_threshold_and_not_at_it(name):
    above = 0.5 + 2**-8  # the next bfloat16
    one = torch.tensor([[1.0]])
    rows = EncodeRows(one, torch.zeros(1), torch.tensor([0.5]), torch.zeros(0, 1), torch.zeros(0))
    found = choice.choose(name)(torch.tensor([[0.5], [above], [-0.5]]), rows)
    assert found.token.tolist() == [1]
    assert found.value.tolist() == [above]


@pytest.mark.parametrize("name", ["cpu", BF16])
def test_a_text_of_many_blocks_is_read_as_its_tokens_are(name):
    rows = make_rows(2100, 16, 2, 0)
    x = torch.randn(700, 16, generator=torch.Generator().manual_seed(1))
    encoder = choice.choose(name)
    whole, parts = encoder(x, rows), [encoder(x[start : start + 100], rows) for start in range(0, 700, 100)]
    assert torch.equal(whole.token, torch.cat([part.token + 100 * n for n, part in enumerate(parts)]))
    for field in ("row", "value", "probe"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts]))


@pytest.mark.parametrize("name", ["cpu", BF16])
def test_tables_leave_with_the_rows_they_were_made_of(name):
    encoder, rows = choice.choose(name), make_rows(5, 8, 1, 0)
    encoder(torch.randn(3, 8), rows)
    (first,) = encoder._held.values()
    encoder(torch.randn(3, 8), rows)
    assert list(encoder._held.values()) == [first]
    del rows
    gc.collect()
    assert not encoder._held


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


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_spoils_the_whole_reading(name, bad):
    x = torch.randn(9, 16)
    x[4, 3] = bad
    found = choice.choose(name)(x, make_rows(5, 16, 2, 0))
    assert not found.finite
    assert len(found.row) == 0


@pytest.mark.parametrize("name", EVERY)
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


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", [1e4, 1e12, 1e18])
def test_large_values_that_float32_holds_are_read(name, size):
    rows = make_rows(20, 16, 2, 5)
    direction = torch.randn(3, 16, generator=torch.Generator().manual_seed(6))
    found = choice.choose(name)(direction * size, rows)
    if name == "cpu-bf16":
        direction, rows = (direction * size).bfloat16() / size, rounded(rows, torch.bfloat16)
    wanted = (direction.double() @ rows.enc_rows.double().T > rows.threshold / size).nonzero()
    assert found.finite
    assert torch.stack([found.token, found.row], dim=1).tolist() == wanted.tolist()
    once = choice.choose(name)(direction, rows).probe
    np.testing.assert_allclose(found.probe, once, atol=0.1 if name == "cpu-bf16" else 1e-4)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_are_multiplied_in_float32(name, dtype):
    rows = make_rows(100, 64, 1, 3)
    x = torch.randn(33, 64).to(dtype)
    found = choice.choose(name)(x, rows)
    exact = choice.choose("reference")(x.float(), rows)
    assert torch.equal(found.row, exact.row)
    np.testing.assert_allclose(found.value, exact.value, atol=1e-4)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("name", ["cpu", BF16])
def test_the_cpu_encoder_holds_no_dense_matrix_of_the_whole_text(name):
    tokens, latents, d_model = 8192, 2048, 16
    rows = make_rows(latents, d_model, 1, 0)
    rows = replace(rows, threshold=rows.threshold + 100)
    with Largest() as largest:
        choice.choose(name)(torch.randn(tokens, d_model), rows)
    assert latents <= largest.elements <= tokens * latents // 16


def test_bf16_without_its_instructions_is_an_error():
    program = "from guard.kernels import choice; choice.choose('cpu-bf16')"
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 1
    assert (
        "encode.backend: found 'cpu-bf16' and a processor without bfloat16 products, expected avx512_bf16"
        in done.stderr
    )


@pytest.mark.parametrize("name", EVERY)
def test_activations_of_another_model_are_refused(name):
    with pytest.raises(ValueError, match=r"activations: found shape \[3, 8\], expected \[T, 16\]"):
        choice.choose(name)(torch.zeros(3, 8), make_rows(2, 16, 0, 0))


def test_an_unknown_backend_is_named():
    with pytest.raises(
        ConfigError, match=r"encode\.backend: found 'gpu', expected one of auto, cpu, cpu-bf16, reference, triton"
    ):
        choice.choose("gpu")
