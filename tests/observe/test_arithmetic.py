"""Start here when FLOPs counted on the meta device are wrong."""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.observe.arithmetic import count_flops


def test_products_count_two_for_each_multiplication():
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    assert count_flops(F.linear, (x, weight)) == 3 * (2 * 3 * 5 * 7)
    assert count_flops(F.linear, (x.detach(), weight)) == 2 * (2 * 3 * 5 * 7)


def test_fused_functions_of_torch_are_decomposed():
    x = torch.randn(4, 100, requires_grad=True)
    # Maximum, difference, exp, sum, quotient; backward product, sum, product, difference.
    assert count_flops(lambda x: torch.softmax(x, -1), (x,)) == pytest.approx(9 * x.numel(), rel=0.01)
    written_out = count_flops(lambda x: (x - x.mean(-1, True)) * x.var(-1, keepdim=True).rsqrt(), (x,))
    assert 0.5 * written_out < count_flops(lambda x: F.layer_norm(x, x.shape[-1:]), (x,)) < 2 * written_out


def test_ops_that_only_move_data_count_nothing():
    x = torch.randn(4, 6, requires_grad=True)
    assert count_flops(lambda x: x.t().contiguous().view(2, 12).chunk(2, -1), (x,)) == 0
    assert count_flops(lambda x: x.bfloat16(), (x,)) == 0
