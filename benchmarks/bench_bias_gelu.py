"""Speed of bias_gelu. Bytes: forward reads x and writes y; backward reads dy and x and writes dx."""

import torch
import torch.nn.functional as F

from fused_megatron.benchmarking.side_by_side import Bars, Case


def unfused(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.gelu(x + bias, approximate="tanh")


def test_bias_gelu(bench, dtype):
    shape = bench.shape(cpu=(4096, 3072), gpu=(8192, 14336), quick=(6, 40))
    x, bias = bench.normal(shape, dtype), bench.normal(shape[1:], dtype)
    bench(
        Case(
            "bias_gelu",
            str(list(shape)),
            (x, bias),
            ours=bench.op("bias_gelu"),
            unfused=unfused,
            num_bytes=5 * x.nbytes,
            bars=Bars(eager=2.2, compile=2.2, bound=1.6),
        )
    )
