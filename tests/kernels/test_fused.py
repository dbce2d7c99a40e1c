"""The fused kernel, in Triton's interpreter where there is no CUDA device: which path ran, precision, what is refused."""

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.kernels import fused, gpu, launch
from guard.kernels.columns import Columns, rounded
from guard.kernels.contract import EncodeRows, rms_normalised
from guard.kernels.reference import ReferenceEncoder
from tests.kernels.exact import QUIET, assert_exact, decoding_up_to, make_rows, poisoned

DEVICE = gpu.device_or_raise()  # fails the whole file where neither a CUDA device nor the interpreter is there
pytestmark = pytest.mark.filterwarnings(QUIET)


@pytest.mark.parametrize(("path", "decoded"), [("prefill", 0), ("decode", 256)])
@settings(deadline=None, max_examples=15)
@given(
    tokens=st.integers(0, 70),
    latents=st.sampled_from([0, 1, 7, 64, 200]),
    d_model=st.sampled_from([1, 3, 64, 129]),
    probes=st.integers(0, 3),
    seed=st.integers(0, 10_000),
)
def test_hits_and_probes_equal_a_double_precision_product(path, decoded, tokens, latents, d_model, probes, seed):
    encoder = gpu.FusedEncoder()
    with poisoned(), decoding_up_to(decoded):
        assert_exact(encoder, tokens, latents, d_model, probes, seed)
    assert encoder.path == path or not tokens


def test_the_path_is_chosen_by_the_number_of_tokens():
    encoder, rows = gpu.FusedEncoder(), make_rows(3, 8, 1, 0)
    for tokens, path in ((1, "decode"), (256, "decode"), (257, "prefill")):
        encoder(torch.randn(tokens, 8), rows)
        assert encoder.path == path


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("activations", [torch.float32, torch.bfloat16])
def test_rows_of_eight_bits_are_multiplied_as_they_were_rounded(dtype, activations):
    rows = make_rows(150, 96, 2, 3)
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(4)).to(activations)
    table, gain = rounded(torch.cat([rows.enc_rows, rows.probe_rows]), dtype)
    table = table.float() * gain[:, None]
    assert 0 < float((table[:150] - rows.enc_rows).abs().max()) < 0.2  # rounded, and still those rows
    with poisoned():
        found = gpu.FusedEncoder(dtype)(x, rows)
    exact = ReferenceEncoder()(x, replace(rows, enc_rows=table[:150], probe_rows=table[150:]))
    assert found.token.tolist() == exact.token.tolist()
    assert found.row.tolist() == exact.row.tolist()
    np.testing.assert_allclose(found.value, exact.value, atol=1e-4)
    np.testing.assert_allclose(found.probe, exact.probe, atol=1e-4)


def test_a_row_of_zeros_stays_one_in_eight_bits_and_other_dtypes_are_refused():
    table, gain = rounded(torch.tensor([[0.0, 0.0], [1.0, -2.0]]), torch.int8)
    np.testing.assert_allclose(table.float() * gain[:, None], [[0.0, 0.0], [64 * 2 / 127, -2.0]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"found dtype torch.float64, expected"):
        rounded(torch.ones(1, 1), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("path", ["decode", "prefill"])
def test_rows_of_half_precision_are_multiplied_as_they_were_rounded(dtype, path):
    rows = make_rows(150, 96, 2, 3)
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(4)).to(dtype).to(DEVICE)
    columns = Columns.on(DEVICE, [rows], dtype=dtype)
    with poisoned():
        hits = launch.HitBuffer.on(columns, 40, 6000)
    status = launch.new_status(columns)
    assert launch.launch(x, columns, status, hits=hits, path=path) == path
    rounded = replace(rows, enc_rows=rows.enc_rows.to(dtype).float(), probe_rows=rows.probe_rows.to(dtype).float())
    exact = ReferenceEncoder()(x.cpu(), rounded)
    told = launch.Status.read(status)
    cell, order = hits.cell[: told.hits].cpu().long().sort()
    assert cell.tolist() == (exact.token * 150 + exact.row).tolist()
    np.testing.assert_allclose(hits.value[: told.hits].cpu()[order], exact.value, atol=1e-4)
    np.testing.assert_allclose(hits.probe.cpu(), exact.probe, atol=1e-4)


def test_activations_may_be_a_slice_or_a_transpose():
    encoder, rows = gpu.FusedEncoder(), make_rows(30, 16, 1, 0)
    wide = torch.randn(50, 40, generator=torch.Generator().manual_seed(2))
    for x in (wide[3:30, 8:24], wide[:16, :20].T):
        exact = ReferenceEncoder()(x, rows)
        found = encoder(x, rows)
        assert torch.equal(found.row, exact.row)
        np.testing.assert_allclose(found.probe, exact.probe, atol=1e-4)


def test_a_text_of_more_hits_than_the_first_buffer_holds_is_encoded_again():
    encoder, rows = gpu.FusedEncoder(), make_rows(100, 8, 1, 0)
    rows = replace(rows, threshold=torch.full((100,), -1e9))
    found = encoder(torch.randn(30, 8), rows)
    assert encoder.launches == 2
    assert len(found.row) == 3000
    assert found.row.tolist() == list(range(100)) * 30


def test_rows_move_to_the_device_once_and_leave_with_their_owner():
    encoder, rows = gpu.FusedEncoder(), make_rows(5, 8, 1, 0)
    encoder(torch.randn(3, 8), rows)
    (first,) = encoder._held.values()
    encoder(torch.randn(3, 8), rows)
    assert list(encoder._held.values()) == [first]
    del rows
    gc.collect()
    assert not encoder._held


def test_probe_values_of_several_hook_points_stand_side_by_side():
    rows = [make_rows(5, 12, 2, 1), make_rows(3, 12, 1, 2)]
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(3))
    columns = Columns.on(DEVICE, rows)
    with poisoned():
        hits = launch.HitBuffer.on(columns, 9, 100)
    launch.launch(x.to(DEVICE), columns, launch.new_status(columns), hits=hits)
    exact = [rms_normalised(part) @ own.probe_rows.T + own.probe_bias for part, own in zip(x, rows, strict=True)]
    np.testing.assert_allclose(hits.probe.cpu(), torch.cat(exact, dim=1), atol=1e-4)


def test_what_does_not_fit_is_refused():
    rows = make_rows(5, 8, 1, 0)
    columns = Columns.on(DEVICE, [rows])
    pool, status = launch.Pool.on(columns, 2), launch.new_status(columns)
    x = torch.zeros(4, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"activations: found shape \[1, 4, 7\], expected \[1, 'T', 8\]"):
        launch.launch(x[:, :7], columns, status)
    with pytest.raises(ValueError, match=r"activations: found torch.float64 of strides"):
        launch.launch(x.double(), columns, status)
    with pytest.raises(ValueError, match=r"slots: found None, expected torch.int32 \[4\]"):
        launch.launch(x, columns, status, pool=pool)
    with pytest.raises(ValueError, match=r"slots: found torch.int64 \[4\], expected torch.int32 \[4\]"):
        launch.launch(x, columns, status, pool=pool, slots=torch.zeros(4, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match=r"hit buffer: found room for 3 tokens, expected 4"):
        launch.launch(x, columns, status, hits=launch.HitBuffer.on(columns, 3, 10))
    with pytest.raises(ValueError, match=r"rows: found d_model \[8, 9\], expected one width for all hook points"):
        Columns.on(DEVICE, [rows, make_rows(5, 9, 1, 0)])
    with pytest.raises(ValueError, match=r"scale of row 0: found .*, expected above its threshold"):
        Columns.on(DEVICE, [rows], scales=[rows.threshold])


def test_the_tiles_keep_within_what_whole_numbers_hold():
    assert 128 * fused.UNIT < 2**31
    for config in [*fused.PREFILL, *fused.DECODE]:
        assert config.kwargs["BLOCK_T"] <= 128
        assert fused.GRAIN % config.kwargs["BLOCK_K"] == 0


def test_an_encoder_of_nothing_still_looks_for_what_is_not_finite():
    rows = EncodeRows(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), torch.zeros(0, 4), torch.zeros(0))
    encoder = gpu.FusedEncoder()
    assert encoder(torch.ones(3, 4), rows).finite
    assert not encoder(torch.full((3, 4), torch.nan), rows).finite
