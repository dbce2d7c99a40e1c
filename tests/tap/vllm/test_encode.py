import numpy as np
import pytest
import torch

from guard.kernels.cpu import CpuEncoder
from guard.pack.loader import HookPointRows
from guard.tap.vllm.encode import BatchEncoder

D, K, P = 24, 11, 2


def hook_point(name, seed):
    rng = np.random.default_rng(seed)

    def floats(*shape):
        return rng.normal(size=shape).astype(np.float32)

    ones = np.ones(K, np.float32)
    return HookPointRows(name, np.arange(K), floats(K, D), floats(K), ones, 9 * ones, floats(P, D), floats(P))


@pytest.fixture
def batch():
    """Two hook points over three requests of 5, 1 and 7 tokens."""
    encoder = BatchEncoder(CpuEncoder(), [hook_point("model.layers.1", 1), hook_point("model.layers.3", 2)])
    generator = torch.Generator().manual_seed(3)
    return (
        encoder,
        [torch.randn(13, D, generator=generator) for _ in range(2)],
        np.arange(13, dtype=np.int32),
        [5, 1, 7],
    )


def test_each_request_gets_what_it_would_get_alone(batch):
    encoder, activations, ids, lengths = batch
    fired = encoder(activations, ids, lengths)
    assert sum(len(part.token) for part in fired) > 20
    begin = 0
    for part, length in zip(fired, lengths, strict=True):
        end = begin + length
        (own,) = encoder([x[begin:end] for x in activations], ids[begin:end], [length])
        assert part.ids.tolist() == list(range(begin, end))
        assert list(zip(part.token, part.row, strict=True)) == list(zip(own.token, own.row, strict=True))
        np.testing.assert_allclose(part.value, own.value, rtol=1e-5)
        np.testing.assert_allclose(part.probe, own.probe, rtol=1e-5, atol=1e-6)
        assert part.probe.shape == (length, 2 * P)
        begin = end
    assert set(np.concatenate([part.row for part in fired])) - set(
        range(K)
    )  # the second hook point's rows, numbered on


def test_what_is_not_finite_spoils_its_own_request_only(batch):
    encoder, activations, ids, lengths = batch
    whole = encoder(activations, ids, lengths)
    activations[1][5, 3] = torch.nan
    first, second, third = encoder(activations, ids, lengths)
    assert (first.finite, second.finite, third.finite) == (True, False, True)
    assert len(second) == 1
    assert not len(second.token)
    np.testing.assert_array_equal(third.row, whole[2].row)
