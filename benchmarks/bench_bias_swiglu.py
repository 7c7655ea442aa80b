"""Speed of bias_swiglu, with and without a bias.

Bytes: forward reads x [T, 2F] and writes y [T, F]; backward reads dy and x and writes dx.
"""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.benchmarking.side_by_side import Bars, Case


def unfused(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    gate, up = (x if bias is None else x + bias).chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_bias_swiglu(bench, dtype, with_bias):
    tokens, width = bench.shape(cpu=(4096, 2048), gpu=(8192, 14336), quick=(6, 40))
    x = bench.normal((tokens, 2 * width), dtype)
    inputs = (x, bench.normal((2 * width,), dtype)) if with_bias else (x,)
    bench(
        Case(
            "bias_swiglu",
            f"[{tokens}, {width}]{'' if with_bias else ' without bias'}",
            inputs,
            ours=bench.op("bias_swiglu"),
            unfused=unfused,
            num_bytes=4 * x.nbytes,
            bars=Bars(eager=1.4, compile=0.95, bound=1.15),
        )
    )
