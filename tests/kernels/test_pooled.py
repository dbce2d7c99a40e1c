"""Pooled sums of streams on the device, against what `guard.scoring` makes of the reference encoder's hits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from guard.kernels import gpu, launch
from guard.kernels.columns import Columns
from guard.kernels.reference import ReferenceEncoder
from guard.pack.manifest import PoolingSection
from guard.scoring.pooling import Gate, Hits, Pool
from tests.kernels.exact import POISON, QUIET, decoding_up_to, make_rows

DEVICE = gpu.device_or_raise()
pytestmark = pytest.mark.filterwarnings(QUIET)


def scales(rows, seed=0):
    rise = torch.rand(len(rows.threshold), generator=torch.Generator().manual_seed(seed)) * 9 + 0.5
    return rows.threshold + rise


def hook_points():
    """Two hook points of odd sizes, one without probes; scales of all; where each one's rows and probes begin."""
    rows = [make_rows(70, 24, 3, 1), make_rows(131, 24, 0, 2)]
    return rows, [scales(r, seed) for seed, r in enumerate(rows)]


def stream_state(rows, scale, x, chosen):
    """What `guard.scoring` makes of the reference encoder's hits: `x [hook points, T, D]`, tokens of one stream."""
    encoded = [ReferenceEncoder()(part[chosen], own) for part, own in zip(x, rows, strict=True)]
    gate = Gate(torch.cat([r.threshold for r in rows]).double().numpy(), torch.cat(scale).double().numpy())
    state = Pool.empty(gate, sum(len(r.probe_rows) for r in rows), PoolingSection(exponent=1.0))
    offsets = np.cumsum([0, *(len(r.enc_rows) for r in rows)])
    hits = Hits(
        token=np.concatenate([e.token.numpy() for e in encoded]),
        row=np.concatenate([e.row.numpy() + o for e, o in zip(encoded, offsets, strict=False)]),
        value=np.concatenate([e.value.numpy() for e in encoded]).astype(np.float64),
        probe=np.concatenate([e.probe.numpy() for e in encoded], axis=1).astype(np.float64),
    )
    state.add(hits, np.zeros((hits.tokens, 3), dtype=np.int64))
    return state, np.bincount(hits.row, minlength=len(state.sums))


def assert_pooled(pool, slot, state, counts):
    assert pool.counts[slot].tolist() == counts.tolist()
    assert int(pool.tokens[slot]) == state.tokens
    np.testing.assert_allclose(pool.strengths()[slot].cpu(), state.sums, atol=1e-5)
    np.testing.assert_allclose(pool.probe_sums[slot].cpu(), state.probe_sums, atol=1e-4)


def pools_equal(one, other):
    """To the last bit; in the interpreter but for the products, where BLAS may sum tiles of other sizes in other orders."""
    slack = 64 if gpu.fused.INTERPRETED else 0  # of 2^-23
    return int((one.sums - other.sums).abs().max()) <= slack and torch.equal(one.counts, other.counts)


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
        assert_pooled(pool.pool, slot, *stream_state(rows, scale, x, slots == slot))
    assert not pool.pool.tokens[3]
    assert not pool.pool.spoiled.any()
    assert pools_equal(pool.pool, chunked.pool)
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
        assert_pooled(pool.pool, slot, *stream_state(rows, scale, x, slots == slot))


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
    assert_pooled(pool.pool, 0, *stream_state(rows, scale, x, slots == 0))


def test_a_slot_that_does_not_exist_is_counted_and_not_written():
    rows, scale = hook_points()
    pool = gpu.FusedPool(Columns.on(DEVICE, rows, scales=scale), slots=2)
    x = torch.randn(2, 6, 24, device=DEVICE)
    pool(x, torch.tensor([0, 2, -1, 9, 1, 1], dtype=torch.int32, device=DEVICE))
    assert launch.Status.read(pool.status).stray == 2
    assert pool.pool.tokens.tolist() == [1, 2]
