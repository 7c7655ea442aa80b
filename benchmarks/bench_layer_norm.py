"""Speed of layer_norm, without and with the residual add.

Bytes: forward reads x and writes y; backward reads dy and x and writes dx. With a residual, forward reads x and
residual and writes y and their sum; backward reads dy, the sum's gradient and the sum, and writes one gradient for x
and residual.
"""

import torch
import torch.nn.functional as F

from fused_megatron.benchmarking.side_by_side import Bars, Case

SHAPES = {"cpu": (4096, 768), "gpu": (8192, 4096), "quick": (6, 40)}


def unfused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def unfused_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return F.layer_norm(total, x.shape[-1:], weight, bias), total


def test_layer_norm(bench, dtype):
    shape = bench.shape(**SHAPES)
    x, weight, bias = (bench.normal(size, dtype) for size in (shape, shape[1:], shape[1:]))
    bench(
        Case(
            "layer_norm",
            str(list(shape)),
            (x, weight, bias),
            ours=bench.op("layer_norm"),
            unfused=unfused,
            num_bytes=5 * x.nbytes,
            bars=Bars(eager=1.0, compile=1.7, bound=1.4),
        )
    )


def test_layer_norm_residual(bench, dtype):
    shape = bench.shape(**SHAPES)
    layer_norm = bench.op("layer_norm", needs="residual")
    x, residual, weight, bias = (bench.normal(size, dtype) for size in (shape, shape, shape[1:], shape[1:]))
    bench(
        Case(
            "layer_norm + residual",
            str(list(shape)),
            (x, residual, weight, bias),
            ours=lambda x, residual, weight, bias: layer_norm(x, weight, bias, residual=residual),
            unfused=unfused_residual,
            num_bytes=8 * x.nbytes,
            bars=Bars(eager=1.3, compile=1.7, bound=1.4),
        )
    )
