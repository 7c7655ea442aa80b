"""Start here when the measured overhead of a call is wrong."""

import torch

import fused_megatron as fm
from fused_megatron.benchmarking.call_overhead import CallOverhead, measure_call_overhead


def test_a_busy_machine_does_not_show():
    assert CallOverhead([100.0, 30.0, 12.0], [3.0, 300.0, 4.0]).overhead_us == 9.0


def test_the_library_op_costs_less_than_the_public_call():
    x = torch.randn(2, 8, requires_grad=True)
    result = measure_call_overhead(lambda: fm.ops.bias_gelu(x), rounds=3)
    assert len(result.call_us) == len(result.library_us) == 3
    assert 0 < result.overhead_us < max(result.call_us)
