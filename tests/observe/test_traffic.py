"""Start here when the counted bytes of an op are wrong."""

import torch

import fused_megatron as fm
from fused_megatron.observe.traffic import measure_traffic

N = 40 * 8 * 4  # bytes of x


def test_ops_read_and_write_and_views_do_not():
    x, row = torch.randn(40, 8), torch.randn(8)
    assert measure_traffic(lambda: x + 1).moved_bytes == 2 * N
    assert measure_traffic(lambda: (x + row).t().view(8, 40)).moved_bytes == 2 * N + 32
    assert measure_traffic(lambda: torch.empty_like(x)).moved_bytes == 0
    assert measure_traffic(lambda: x.clone().add_(x)).moved_bytes == 2 * N + 3 * N


def test_a_fused_op_moves_and_keeps_less():
    x, bias = torch.randn(40, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    dy = torch.randn(40, 8)

    def step(op):
        return lambda: torch.autograd.grad(op(x, bias), (x, bias), dy)

    ours = measure_traffic(step(fm.ops.bias_gelu))
    unfused = measure_traffic(step(lambda x, bias: torch.nn.functional.gelu(x + bias, approximate="tanh")))
    assert ours.moved_bytes == 5 * N + 3 * 32  # bias forward, bias backward, its gradient
    assert unfused.moved_bytes == 8 * N + 2 * 32  # also x + bias written and read, dx read for its sum
    assert ours.saved_bytes == N + 32 and unfused.saved_bytes == N
