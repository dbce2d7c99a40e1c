import numpy as np
import pytest
import torch

from guard.errors import ConfigError
from guard.kernels.contract import EncodeRows
from guard.kernels.cpu import CpuEncoder
from guard.kernels.reference import ReferenceEncoder
from guard.kernels.stacked import StackedRows

D = 48


def rows(seed, latents, probes, d_model=D):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return EncodeRows(
        normal(latents, d_model), normal(latents), torch.full((latents,), 6.0), normal(probes, d_model), normal(probes)
    )


HOOK_POINTS = [rows(1, 37, 2), rows(2, 11, 0), rows(3, 64, 3)]


@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_says_what_the_reference_says_hook_point_by_hook_point(tokens, dtype):
    generator = torch.Generator().manual_seed(tokens)
    seen = [torch.randn(tokens, D, generator=generator).to(dtype) for _ in HOOK_POINTS]
    seen[0][0] = 0  # a token without a direction
    found = StackedRows(HOOK_POINTS).encode(seen)
    hits, probes, first = {}, [], 0
    for x, point in zip(seen, HOOK_POINTS, strict=True):
        told = ReferenceEncoder()(x, point)
        hits |= {
            (t, r + first): v
            for t, r, v in zip(told.token.tolist(), told.row.tolist(), told.value.tolist(), strict=True)
        }
        probes.append(told.probe.numpy())
        first += len(point.enc_rows)
    keys = list(zip(found.token.tolist(), found.row.tolist(), strict=True))
    assert keys == sorted(hits)
    np.testing.assert_allclose(found.value, [hits[key] for key in keys], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.probe, np.concatenate(probes, axis=1), rtol=1e-5, atol=1e-5)


def test_rounded_rows_fire_as_they_do_hook_point_by_hook_point():
    try:
        encoder = CpuEncoder(torch.bfloat16)
    except ConfigError as error:
        pytest.skip(str(error))
    seen = [torch.randn(7, D, generator=torch.Generator().manual_seed(4)).bfloat16() for _ in HOOK_POINTS]
    found = StackedRows(HOOK_POINTS, encoder).encode(seen)
    parts = [encoder(x, point) for x, point in zip(seen, HOOK_POINTS, strict=True)]
    starts = np.cumsum([0, *(len(point.enc_rows) for point in HOOK_POINTS)])
    token = np.concatenate([part.token for part in parts])
    row = np.concatenate([part.row + start for part, start in zip(parts, starts, strict=False)])
    order = np.lexsort((row, token))
    assert found.token.tolist() == token[order].tolist()
    assert found.row.tolist() == row[order].tolist()
    np.testing.assert_array_equal(found.value, np.concatenate([part.value for part in parts])[order])
    wanted = np.concatenate([part.probe for part in parts], axis=1)
    np.testing.assert_allclose(found.probe, wanted, rtol=1e-5, atol=1e-5)


def test_torch_keeps_its_threads():
    before = torch.get_num_threads()
    StackedRows(HOOK_POINTS).encode([torch.ones(1, D) for _ in HOOK_POINTS])
    assert torch.get_num_threads() == before


def test_a_value_at_the_threshold_does_not_fire():
    point = EncodeRows(torch.eye(2), torch.zeros(2), torch.tensor([1.0, 1.0]), torch.zeros(0, 2), torch.zeros(0))
    found = StackedRows([point]).encode([torch.tensor([[1.0, 1.0000001]])])
    assert found.row.tolist() == [1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e19])
def test_what_cannot_be_used_is_not(value):
    seen = [torch.ones(2, D) for _ in HOOK_POINTS]
    seen[1][1, 0] = value
    assert StackedRows(HOOK_POINTS).encode(seen) is None


def test_widths_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"found d_model \[8, 48\], expected one width"):
        StackedRows([rows(1, 3, 1), rows(2, 3, 1, d_model=8)])
