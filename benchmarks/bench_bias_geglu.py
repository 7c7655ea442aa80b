"""Speed of bias_geglu. Bytes: forward reads x [T, 2F] and writes y [T, F]; backward reads dy and x and writes dx."""

import torch
import torch.nn.functional as F

from fused_megatron.benchmarking.side_by_side import Case


def unfused(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    gate, up = (x + bias).chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def test_bias_geglu(bench, dtype):
    tokens, width = bench.shape(cpu=(4096, 2048), gpu=(8192, 14336), quick=(6, 40))
    x, bias = (bench.normal(shape, dtype) for shape in ((tokens, 2 * width), (2 * width,)))
    bench(
        Case(
            "bias_geglu",
            f"[{tokens}, {width}]",
            (x, bias),
            ours=bench.op("bias_geglu"),
            unfused=unfused,
            num_bytes=4 * x.nbytes,
        )
    )
