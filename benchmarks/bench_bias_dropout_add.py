"""Speed of bias_dropout_add.

Bytes: forward reads x and residual and writes y; backward reads dy and writes dx (the gradient of residual is dy).
"""

import torch
import torch.nn.functional as F

from fused_megatron.benchmarking.side_by_side import Bars, Case

P = 0.1


def unfused(x: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return residual + F.dropout(x + bias, P)


def exact(inputs, upstream, outputs, gradients):
    """Return the exact results for the dropout mask that the gradient of x shows."""
    x, bias, residual = (t.detach().double() for t in inputs)
    kept = gradients[0] != 0
    share, spread = kept.double().mean().item(), (P * (1 - P) / kept.numel()) ** 0.5
    assert abs(share - (1 - P)) <= 6 * spread, f"{share:.4f} of the elements are kept, not {1 - P}"
    dy = upstream[0].double()
    dx = kept * dy / (1 - P)
    return residual + kept * (x + bias) / (1 - P), dx, dx.sum(0), dy


def test_bias_dropout_add(bench, dtype):
    shape = bench.shape(cpu=(4096, 768), gpu=(8192, 4096), quick=(6, 40))
    inputs = tuple(bench.normal(size, dtype) for size in (shape, shape[1:], shape))
    ours = bench.op("bias_dropout_add")
    bench(
        Case(
            "bias_dropout_add",
            f"{list(shape)}, p = {P}",
            inputs,
            ours=lambda x, bias, residual: ours(x, bias, residual, P),
            unfused=unfused,
            num_bytes=5 * inputs[0].nbytes,
            exact=exact,
            bars=Bars(eager=4.0, compile=5.0, bound=3.0),
        )
    )
