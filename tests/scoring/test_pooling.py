"""The running state: streams add up to whole texts, and what is kept of each latent is its strongest hits."""

from itertools import pairwise

import numpy as np
import pytest

from guard.pack.manifest import PoolingSection
from guard.scoring.pooling import SPANS_KEPT, Gate, Hits, Pool

MEAN = PoolingSection(exponent=1.0)


def fresh(latents: int, probes: int, pooling: PoolingSection = MEAN) -> Pool:
    """Latents that fire above 0.5 and are strong at 2.5."""
    return Pool.empty(Gate(np.full(latents, 0.5), np.full(latents, 2.5)), probes, pooling)


def some_hits(tokens: int, latents: int, seed: int = 0) -> tuple[Hits, np.ndarray]:
    rng = np.random.default_rng(seed)
    token, row = np.divmod(np.unique(rng.integers(0, tokens * latents, size=tokens * 3)), latents)
    where = np.stack([np.arange(tokens) * 2, np.arange(tokens) * 2 + 2, np.zeros(tokens, int)], axis=1)
    return Hits(token, row, rng.exponential(2.0, size=len(token)), rng.normal(size=(tokens, 2))), where


def part(hits: Hits, begin: int, end: int) -> Hits:
    inside = (hits.token >= begin) & (hits.token < end)
    return Hits(hits.token[inside] - begin, hits.row[inside], hits.value[inside], hits.probe[begin:end])


@pytest.mark.parametrize("cuts", [[0, 50], [0, 1, 2, 30, 50], list(range(51))])
def test_a_stream_adds_up_to_the_whole_text(cuts):
    hits, where = some_hits(50, 7)
    whole = fresh(7, 2)
    whole.add(hits, where)
    stream = fresh(7, 2)
    for begin, end in pairwise(cuts):
        stream.add(part(hits, begin, end), where[begin:end])
    np.testing.assert_allclose(stream.pooled(), whole.pooled(), rtol=1e-12)
    np.testing.assert_allclose(stream.pooled_probes(), whole.pooled_probes(), rtol=1e-12)
    np.testing.assert_allclose(stream.peak, whole.peak)
    for row in range(7):
        streamed, at_once = (
            np.sort(np.array(s.strength)[s.row == row]) for s in (stream.spans(np.arange(7)), whole.spans(np.arange(7)))
        )
        np.testing.assert_allclose(streamed, at_once)


def test_state_stays_small_however_long_the_stream():
    state = fresh(5, 2)
    for seed in range(40):
        hits, where = some_hits(100, 5, seed)
        state.add(hits, where)
    assert state.tokens == 4000
    assert sum(len(part.row) for part in state.kept) < 4500  # of some 9,000
    assert len(state.spans(np.arange(5)).row) == 5 * SPANS_KEPT


def test_the_strongest_hits_of_each_latent_are_told_and_of_two_alike_the_earlier():
    rng = np.random.default_rng(3)
    tokens = 6000
    hits = Hits(
        np.arange(tokens), rng.integers(0, 3, tokens), rng.choice([0.6, 1.0, 2.0, 9.0], tokens), np.zeros((tokens, 1))
    )
    hits = Hits(hits.token, hits.row, np.where(rng.random(tokens) < 0.003, hits.value, 0.6), hits.probe)
    where = np.stack([np.arange(tokens), np.arange(tokens) + 1, np.zeros(tokens, int)], axis=1)
    streamed, joined = fresh(3, 1), fresh(3, 1)
    for begin, end in pairwise([*range(0, tokens, 50), tokens]):
        streamed.add(part(hits, begin, end), where[begin:end])
        after = fresh(3, 1)
        after.add(part(hits, begin, end), where[begin:end])
        joined = joined.joined(after)
        joined.trim()
    for row in range(3):
        mine = np.flatnonzero(hits.row == row)
        best = mine[np.argsort(-np.minimum((hits.value[mine] - 0.5) / 2.0, 1.0), kind="stable")][:SPANS_KEPT]
        assert streamed.spans(np.array([row])).start == sorted(best)
        assert joined.spans(np.array([row])).start == sorted(best)


def test_pooled_values_worked_out_by_hand():
    # latent 0 fires with 1 and 8 on two of four tokens: a quarter of the way from 0.5 to 2.5, and beyond it
    hits = Hits(np.array([0, 2]), np.array([0, 0]), np.array([1.0, 8.0]), np.array([[1.0], [2.0], [3.0], [6.0]]))
    nowhere = np.zeros((4, 3), dtype=np.int64)
    state = fresh(1, 1)
    state.add(hits, nowhere)
    assert state.pooled().tolist() == [(0.25 + 1) / 4]
    assert state.pooled_probes().tolist() == [3.0]
    assert state.peak.tolist() == [8 / 2.5]
    by_root = fresh(1, 1, PoolingSection(exponent=0.5))
    by_root.add(hits, nowhere)
    assert by_root.pooled().tolist() == [1.25 / 2]  # divided by sqrt(4)
    rooted = fresh(1, 1, PoolingSection(exponent=1.0, power=0.5))
    rooted.add(hits, nowhere)
    assert rooted.pooled().tolist() == [(1.25 / 4) ** 0.5]
    assert (rooted.pooled_per_unit() * 1.25).tolist() == pytest.approx([(1.25 / 4) ** 0.5])  # the tokens' parts


def test_prior_tokens_make_a_few_tokens_little_evidence():
    pooling = PoolingSection(exponent=0.5, power=0.5, prior_tokens=12)
    hits = Hits(np.array([0, 2]), np.array([0, 0]), np.array([1.0, 8.0]), np.array([[1.0], [2.0], [3.0], [6.0]]))
    state = fresh(1, 1, pooling)
    state.add(hits, np.zeros((4, 3), dtype=np.int64))
    assert state.pooled().tolist() == [(1.25 / 4) ** 0.5]  # divided by sqrt(4 + 12)
    assert state.pooled_probes().tolist() == [12 / 16]
    assert (state.pooled_per_unit() * 1.25).tolist() == pytest.approx(state.pooled().tolist())


def test_a_hit_just_above_its_threshold_counts_next_to_nothing():
    above = np.nextafter(np.float32(0.5), np.float32(1.0))
    state = fresh(1, 1, PoolingSection(exponent=1.0, power=0.5))
    state.add(Hits(np.array([0]), np.array([0]), np.array([above]), np.zeros((1, 1))), np.zeros((1, 3), dtype=np.int64))
    assert 0 < state.pooled()[0] < 1e-3


def test_an_empty_run_changes_nothing():
    state = fresh(3, 1)
    none = np.zeros(0, dtype=np.int64)
    state.add(Hits(none, none, np.zeros(0), np.zeros((0, 1))), np.zeros((0, 3), dtype=np.int64))
    assert state.tokens == 0
    assert state.pooled().tolist() == [0, 0, 0]
