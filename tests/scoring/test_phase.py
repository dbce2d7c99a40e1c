"""A phase's passages: a harmful one is found wherever it stands, and however the phase comes in."""

from itertools import pairwise

import numpy as np
import pytest

from guard.pack.manifest import PoolingSection
from guard.scoring.phase import PhaseState
from guard.scoring.pooling import Gate, Hits, Pool

LATENTS, SIZE = 3, 8
# Head 0 likes latent 0, head 1 likes latent 1 and the probe, head 2 dislikes latent 2.
CAUTION = np.array([0.1, 0.05, 0.0])
WEIGHTS, PROBES = np.array([[2.0, 0, 0], [0, 2.0, 0], [0, 0, -2.0]]), np.array([0, 1.0, 0])


def logits(pools):
    return np.stack([pool.pooled() @ WEIGHTS.T + PROBES * pool.pooled_probes()[0] for pool in pools])


def fresh(size=SIZE, caution=0):
    gate = Gate(np.full(LATENTS, 0.5), np.full(LATENTS, 2.5))
    return PhaseState(
        lambda begin: Pool.empty(gate, 1, PoolingSection(exponent=1.0), begin), size, CAUTION * caution, logits
    )


def text(tokens, **hits):
    """`latent_0=[3, 4]` fires fully on tokens 3 and 4; `where` gives each token two characters."""
    on = [(t, int(name[-1])) for name, places in hits.items() for t in places]
    token, row = (np.array([pair[i] for pair in on], dtype=np.int64) for i in (0, 1))
    where = np.stack([np.arange(tokens) * 2, np.arange(tokens) * 2 + 2, np.zeros(tokens, int)], axis=1)
    return Hits(token, row, np.full(len(on), 9.0), np.zeros((tokens, 1))), where


def read(hits, where, cuts=None, size=SIZE, caution=0):
    state = fresh(size, caution)
    for begin, end in pairwise(cuts or [0, hits.tokens]):
        inside = (np.arange(hits.tokens) >= begin) & (np.arange(hits.tokens) < end)
        state.add(hits.of(inside), where[begin:end])
    return state


def brute_force(hits, where, size=SIZE, caution=0):
    """The most that each head says of the whole, and of every two half passages in a row."""
    starts = [*range(0, hits.tokens, size // 2)]
    ranges = [(0, hits.tokens)]
    if hits.tokens > size:
        ranges += [(begin, min(begin + size, hits.tokens)) for begin in starts[:-1]]
    said = []
    for begin, end in ranges:
        inside = (np.arange(hits.tokens) >= begin) & (np.arange(hits.tokens) < end)
        said.append(logits([read(hits.of(inside), where[begin:end], size=0).whole])[0])
        if len(said) > 1:
            said[-1] -= CAUTION * caution * np.log(len(ranges) - 1)
    return np.max(said, axis=0)


@pytest.mark.parametrize("at", [0, 3, 17, 38])
def test_one_harmful_passage_is_scored_as_if_little_stood_around_it(at):
    hits, where = text(40, latent_0=[at, at + 1])
    severe = read(hits, where).severest()[0]
    assert severe.begin <= at < at + 2 <= severe.begin + severe.tokens
    assert severe.tokens <= SIZE
    assert logits([severe])[0, 0] == 2.0 * 2 / severe.tokens
    assert (severe.first[0], severe.last[1]) == (severe.begin * 2, (severe.begin + severe.tokens) * 2)


def test_a_head_says_the_most_of_the_whole_and_of_its_passages_whatever_the_length_and_the_cuts():
    rng = np.random.default_rng(0)
    for tokens in [1, 4, 7, 8, 9, 11, 12, 13, 16, 31, 50]:
        on = {f"latent_{i}": np.flatnonzero(rng.random(tokens) < 0.2).tolist() for i in range(LATENTS)}
        hits, where = text(tokens, **on)
        hits = Hits(hits.token, hits.row, hits.value, rng.normal(size=(tokens, 1)))
        for cuts in ([0, tokens], [*range(tokens + 1)], sorted({0, tokens, *rng.integers(0, tokens + 1, 3).tolist()})):
            for caution in (0, 1):
                state = read(hits, where, cuts, caution=caution)
                expected = brute_force(hits, where, caution=caution)
                assert state.most(logits(state.unsettled())) == pytest.approx(expected, abs=1e-12)
                held = [
                    0 if pool is state.whole else back
                    for pool, back in zip(state.severest(), state.held_back(), strict=True)
                ]
                assert logits(state.severest()).diagonal() - held == pytest.approx(expected, abs=1e-12)


def test_a_phase_no_longer_than_a_passage_has_none():
    hits, where = text(SIZE, latent_0=[2])
    hits = Hits(hits.token, hits.row, hits.value, np.random.default_rng(0).normal(size=(SIZE, 1)))
    for cuts in ([0, SIZE], [*range(SIZE + 1)], [0, 3, 3, SIZE, SIZE]):  # an empty run changes nothing
        state = read(hits, where, cuts)
        assert state.severest() == [state.whole] * 3


def test_what_is_everywhere_is_said_of_the_whole():
    hits, where = text(40, latent_0=range(40))
    state = read(hits, where)
    assert state.severest()[0] is state.whole


def test_a_harmful_passage_still_counts_when_much_has_followed_it():
    hits, where = text(400, latent_1=[10, 11, 12])
    early = read(hits.of(np.arange(400) < 20), where[:20]).severest()[1]
    late = read(hits, where).severest()[1]
    assert late.begin == early.begin
    assert logits([late])[0, 1] == logits([early])[0, 1]


@pytest.mark.parametrize("often", [0.5, 0.02, 0.0])
def test_memory_does_not_grow_with_the_phase(often):
    state = fresh()
    rng = np.random.default_rng(1)
    for _ in range(100):
        hits, where = text(100, **{f"latent_{i}": np.flatnonzero(rng.random(100) < often) for i in range(LATENTS)})
        state.add(hits, where)
        pools = {*state.unsettled(), *state.severest()}
        assert sum(len(part.row) for pool in pools for part in pool.kept) < 4500  # of up to 15,000
        assert sum(len(pool.kept) for pool in pools) < 200


def test_without_passages_all_is_said_of_the_whole():
    hits, where = text(400, latent_1=[10, 11, 12])
    state = read(hits, where, size=0)
    assert state.severest() == [state.whole] * 3


def test_one_severe_passage_of_many_says_less_than_one_of_few():
    said = []
    for tokens in (16, 64, 256):
        hits, where = text(tokens, latent_1=[10, 11, 12])
        state = read(hits, where, caution=1)
        said.append(state.most(logits(state.unsettled()))[1])
        assert state.severest()[1].begin == 8
    assert said == sorted(said, reverse=True)
    assert said[0] - said[-1] == pytest.approx(0.05 * (np.log(63) - np.log(3)))
