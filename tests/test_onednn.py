"""Weights that are laid out once multiply as any others do, however many rows come."""

import pytest
import torch

from guard import onednn
from guard.reader.model import LaidOut, _lay_out

pytestmark = pytest.mark.skipif(not onednn.can_lay_out(torch.float32), reason="torch was built without oneDNN")


@pytest.mark.parametrize("rows", [0, 1, 5, 16, 17, 100, 257])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_is_laid_out_gives_what_it_gave(rows, bias):
    torch.manual_seed(rows)
    linear = torch.nn.Linear(40, 24, bias=bias)
    x = torch.randn(rows, 40)
    with torch.inference_mode():
        assert torch.allclose(LaidOut(linear)(x), linear(x), atol=1e-5)
        assert torch.equal(LaidOut(linear).weight, linear.weight)
        batch = x.repeat(3, 1, 1)
        assert LaidOut(linear)(batch).shape == (3, rows, 24)
        assert torch.allclose(LaidOut(linear)(batch), linear(batch), atol=1e-5)


@pytest.mark.skipif(not onednn.can_lay_out(torch.bfloat16), reason="this oneDNN has no bfloat16 products")
def test_bfloat16_too():
    linear = torch.nn.Linear(64, 32, bias=False).bfloat16()
    x = torch.randn(21, 64).bfloat16()
    with torch.inference_mode():
        assert torch.allclose(LaidOut(linear)(x).float(), linear(x).float(), atol=0.02)


def test_few_sizes_reach_onednn_and_none_is_much_larger_than_what_came():
    sizes = {rows: onednn.padded(rows) for rows in range(1, 4097)}
    assert all(rows <= size <= rows * 17 / 16 for rows, size in sizes.items())
    assert len(set(sizes.values())) < 150


def test_what_multiplies_in_another_way_is_left_alone():
    class Twice(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = torch.nn.Linear(4, 4)
    hooked.register_forward_pre_hook(lambda _module, given: (given[0] + 1,))
    body = torch.nn.Sequential(torch.nn.Linear(4, 4), Twice(4, 4), hooked, torch.nn.Sequential(torch.nn.Linear(4, 4)))
    x = torch.randn(3, 4)
    with torch.inference_mode():
        expected = body(x)
        _lay_out(body)
        assert torch.allclose(body(x), expected, atol=1e-5)
    assert [type(module) for module in body[:3]] == [LaidOut, Twice, torch.nn.Linear]
    assert type(body[3][0]) is LaidOut
