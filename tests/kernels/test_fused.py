"""The fused kernel, in Triton's interpreter where there is no CUDA device: paths, overflow, pooled sums, choice."""

import gc
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.kernels import choice, fused, gpu, launch
from guard.kernels.columns import Columns
from guard.kernels.contract import EncodeRows, rms_normalised
from guard.kernels.reference import ReferenceEncoder
from guard.pack.manifest import PoolingSection
from guard.scoring.pooling import Gate, Hits, PhaseState
from tests.kernels.exact import assert_exact, make_rows

DEVICE = gpu.device_or_raise()  # fails the whole file where neither a CUDA device nor the interpreter is there
POISON = -7777


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


def scales(rows, seed=0):
    rise = torch.rand(len(rows.threshold), generator=torch.Generator().manual_seed(seed)) * 9 + 0.5
    return rows.threshold + rise


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


def hook_points():
    """Two hook points of odd sizes, one without probes; scales of all; where each one's rows and probes begin."""
    rows = [make_rows(70, 24, 3, 1), make_rows(131, 24, 0, 2)]
    return rows, [scales(r, seed) for seed, r in enumerate(rows)]


def stream_state(rows, scale, x, chosen):
    """What `guard.scoring` makes of the reference encoder's hits: `x [hook points, T, D]`, tokens of one stream."""
    encoded = [ReferenceEncoder()(part[chosen], own) for part, own in zip(x, rows, strict=True)]
    gate = Gate(torch.cat([r.threshold for r in rows]).double().numpy(), torch.cat(scale).double().numpy())
    state = PhaseState(gate, sum(len(r.probe_rows) for r in rows), PoolingSection(exponent=1.0))
    offsets = np.cumsum([0, *(len(r.enc_rows) for r in rows)])
    hits = Hits(
        token=np.concatenate([e.token.numpy() for e in encoded]),
        row=np.concatenate([e.row.numpy() + o for e, o in zip(encoded, offsets, strict=False)]),
        value=np.concatenate([e.value.numpy() for e in encoded]).astype(np.float64),
        probe=np.concatenate([e.probe.numpy() for e in encoded], axis=1).astype(np.float64),
    )
    state.add(hits, np.zeros((hits.tokens, 3), dtype=np.int64))
    return state


def assert_pooled(pool, slot, state):
    assert pool.counts[slot].tolist() == state.counts.tolist()
    assert int(pool.tokens[slot]) == state.tokens
    np.testing.assert_allclose(pool.strengths()[slot].cpu(), state.sums, atol=1e-5)
    np.testing.assert_allclose(pool.probe_sums[slot].cpu(), state.probe_sums, atol=1e-4)


def pools_equal(one, other):
    return torch.equal(one.sums, other.sums) and torch.equal(one.counts, other.counts)


@pytest.mark.parametrize("decoded", [0, 256])
def test_pooled_sums_are_those_of_scoring_for_any_mixture_of_streams_and_any_chunks(decoded):
    rows, scale = hook_points()
    x = torch.randn(2, 90, 24, generator=torch.Generator().manual_seed(5))
    slots = torch.tensor([2] * 40 + [0, 2, 1] * 15 + [-1] * 5, dtype=torch.int32)  # whole tiles of one, and a mixture
    columns = Columns.on(DEVICE, rows, scales=scale)
    pool = gpu.FusedPool(columns, slots=4)
    chunked = gpu.FusedPool(columns, slots=4)
    with decoding_up_to(decoded):
        pool(x.to(DEVICE), slots.to(DEVICE))
        for begin in range(0, 90, 7):
            part = slice(begin, begin + 7)
            chunked(x[:, part].to(DEVICE), slots[part].to(DEVICE))
    assert pool.path == ("decode" if decoded else "prefill")
    for slot in range(3):
        assert_pooled(pool.pool, slot, stream_state(rows, scale, x, slots == slot))
    assert not pool.pool.tokens[3]
    assert not pool.pool.spoiled.any()
    assert pools_equal(pool.pool, chunked.pool)  # to the last bit
    np.testing.assert_allclose(pool.pool.probe_sums.cpu(), chunked.pool.probe_sums.cpu(), atol=1e-4)
    pool.pool.clear(torch.tensor([2], device=DEVICE))
    assert [int(n) for n in pool.pool.tokens] == [15, 15, 0, 0]
    assert not pool.pool.sums[2].any()


@pytest.mark.parametrize("decoded", [0, 256])
def test_an_overflow_is_counted_writes_nothing_outside_and_leaves_the_sums_exact(decoded):
    rows, scale = hook_points()
    x = torch.randn(2, 50, 24, generator=torch.Generator().manual_seed(6))
    slots = torch.arange(50, dtype=torch.int32) % 3
    columns = Columns.on(DEVICE, rows, scales=scale)
    pool = gpu.FusedPool(columns, slots=3, tokens=50, capacity=20)
    room = torch.full((60,), POISON, dtype=torch.int32, device=DEVICE)
    values = torch.full((60,), torch.nan, device=DEVICE)
    pool.hits = replace(pool.hits, cell=room[20:40], value=values[20:40])
    with decoding_up_to(decoded):
        pool(x.to(DEVICE), slots.to(DEVICE))
    told = launch.Status.read(pool.status)
    dense = torch.cat(
        [part @ own.enc_rows.T + own.bias - own.threshold for part, own in zip(x, rows, strict=True)], dim=1
    )  # [T, K]
    assert told == launch.Status(hits=int((dense > 0).sum()), finite=True, stray=0)
    assert told.hits > 20
    assert (room[:20] == POISON).all()
    assert (room[40:] == POISON).all()
    assert values[:20].isnan().all()
    assert values[40:].isnan().all()
    cells = room[20:40].cpu().long()
    assert len(set(cells.tolist())) == 20
    assert (dense.flatten()[cells] > 0).all()
    for slot in range(3):
        assert_pooled(pool.pool, slot, stream_state(rows, scale, x, slots == slot))


@pytest.mark.parametrize("decoded", [0, 256])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_a_stream_that_is_not_finite_is_named_and_no_other_suffers(decoded, bad):
    rows, scale = hook_points()
    x = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(7))
    slots = torch.arange(40, dtype=torch.int32) % 2
    broken = x.clone()
    broken[1, 21, 5] = bad  # of slot 1, at the hook point that has no probes
    pool = gpu.FusedPool(Columns.on(DEVICE, rows, scales=scale), slots=2)
    with decoding_up_to(decoded):
        pool(broken.to(DEVICE), slots.to(DEVICE))
        assert not launch.Status.read(pool.status).finite
        pool(torch.zeros(2, 0, 24, device=DEVICE), slots[:0].to(DEVICE))
    assert launch.Status.read(pool.status).finite  # of that launch; the slot stays void
    assert pool.pool.spoiled.tolist() == [0, 1]
    assert_pooled(pool.pool, 0, stream_state(rows, scale, x, slots == 0))


def test_a_slot_that_does_not_exist_is_counted_and_not_written():
    rows, scale = hook_points()
    pool = gpu.FusedPool(Columns.on(DEVICE, rows, scales=scale), slots=2)
    x = torch.randn(2, 6, 24, device=DEVICE)
    pool(x, torch.tensor([0, 2, -1, 9, 1, 1], dtype=torch.int32, device=DEVICE))
    assert launch.Status.read(pool.status).stray == 2
    assert pool.pool.tokens.tolist() == [1, 2]


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


def run_without_interpreter(program, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path)}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=env)


def test_triton_without_a_device_is_an_error_and_auto_encodes_on_the_cpu(tmp_path):
    program = """
import sys
from guard.errors import ConfigError
from guard.kernels import choice
print(choice.choose("auto").name, "triton" in sys.modules)
try:
    choice.choose("triton")
except ConfigError as error:
    print(error)
"""
    done = run_without_interpreter(program, tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "cpu False"
    assert second.startswith("encode.backend: found 'triton' and no CUDA device (torch 2.")
    assert "expected one, or TRITON_INTERPRET=1" in second


def test_triton_that_is_not_installed_is_an_error(monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda _: None)
    with pytest.raises(choice.ConfigError, match=r"found 'triton' and no package of that name, expected pip install"):
        choice.choose("triton")


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
