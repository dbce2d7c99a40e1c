"""The running state: streams add up to whole texts, and what is kept of each latent is its strongest hits."""

from itertools import pairwise

import numpy as np
import pytest

from guard.pack.manifest import PoolingSection
from guard.scoring.pooling import SPANS_KEPT, Hits, PhaseState

CLIP = PoolingSection(activation="clip", exponent=1.0)


def some_hits(tokens: int, latents: int, seed: int = 0) -> tuple[Hits, np.ndarray]:
    rng = np.random.default_rng(seed)
    token = np.sort(rng.integers(0, tokens, size=tokens * 3))
    row = rng.integers(0, latents, size=len(token))
    where = np.stack([np.arange(tokens) * 2, np.arange(tokens) * 2 + 2, np.zeros(tokens, int)], axis=1)
    return Hits(token, row, rng.exponential(2.0, size=len(token)), rng.normal(size=(tokens, 2))), where


def part(hits: Hits, begin: int, end: int) -> Hits:
    inside = (hits.token >= begin) & (hits.token < end)
    return Hits(hits.token[inside] - begin, hits.row[inside], hits.value[inside], hits.probe[begin:end])


@pytest.mark.parametrize("cuts", [[0, 50], [0, 1, 2, 30, 50], list(range(51))])
def test_a_stream_adds_up_to_the_whole_text(cuts):
    hits, where = some_hits(50, 7)
    whole = PhaseState(np.full(7, 1.5), 2, CLIP)
    whole.add(hits, where)
    stream = PhaseState(np.full(7, 1.5), 2, CLIP)
    for begin, end in pairwise(cuts):
        stream.add(part(hits, begin, end), where[begin:end])
    np.testing.assert_allclose(stream.pooled(), whole.pooled(), rtol=1e-12)
    np.testing.assert_allclose(stream.pooled_probes(), whole.pooled_probes(), rtol=1e-12)
    np.testing.assert_allclose(stream.peak, whole.peak)
    for row in range(7):
        strengths, _ = stream.hits_of(row)
        np.testing.assert_allclose(np.sort(strengths), np.sort(whole.hits_of(row)[0]))


def test_state_stays_small_however_long_the_stream():
    state = PhaseState(np.full(5, 1.0), 2, CLIP)
    for seed in range(40):
        hits, where = some_hits(100, 5, seed)
        state.add(hits, where)
    assert state.tokens == 4000
    assert len(state.kept_row) <= 5 * SPANS_KEPT


def test_pooled_values_worked_out_by_hand():
    # latent 0 (scale 2) fires with 1 and 8 on two of four tokens: (0.5 + 1) / 4
    hits = Hits(np.array([0, 2]), np.array([0, 0]), np.array([1.0, 8.0]), np.array([[1.0], [2.0], [3.0], [6.0]]))
    state = PhaseState(np.array([2.0]), 1, CLIP)
    state.add(hits, np.zeros((4, 3), dtype=np.int64))
    assert state.pooled().tolist() == [0.375]
    assert state.pooled_probes().tolist() == [3.0]
    assert state.peak.tolist() == [4.0]
    by_firing = PhaseState(np.array([2.0]), 1, PoolingSection(activation="fire", exponent=0.5))
    by_firing.add(hits, np.zeros((4, 3), dtype=np.int64))
    assert by_firing.pooled().tolist() == [1.0]  # 2 tokens / sqrt(4)
    rooted = PhaseState(np.array([2.0]), 1, PoolingSection(activation="clip", exponent=1.0, power=0.5))
    rooted.add(hits, np.zeros((4, 3), dtype=np.int64))
    assert rooted.pooled().tolist() == [0.375**0.5]
    assert (rooted.pooled_per_unit() * 1.5).tolist() == pytest.approx([0.375**0.5])  # the tokens' parts add up to it


def test_an_empty_run_changes_nothing():
    state = PhaseState(np.ones(3), 1, CLIP)
    none = np.zeros(0, dtype=np.int64)
    state.add(Hits(none, none, np.zeros(0), np.zeros((0, 1))), np.zeros((0, 3), dtype=np.int64))
    assert state.tokens == 0
    assert state.pooled().tolist() == [0, 0, 0]
