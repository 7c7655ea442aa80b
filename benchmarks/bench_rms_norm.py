"""Speed of rms_norm, without and with the residual add. Bytes: as in bench_layer_norm.py."""

import torch
import torch.nn.functional as F

from fused_megatron.benchmarking.side_by_side import Bars, Case

SHAPES = {"cpu": (4096, 768), "gpu": (8192, 4096), "quick": (6, 40)}


def unfused(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight)


def unfused_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return F.rms_norm(total, x.shape[-1:], weight), total


def test_rms_norm(bench, dtype):
    shape = bench.shape(**SHAPES)
    x, weight = bench.normal(shape, dtype), bench.normal(shape[1:], dtype)
    bench(
        Case(
            "rms_norm",
            str(list(shape)),
            (x, weight),
            ours=bench.op("rms_norm"),
            unfused=unfused,
            num_bytes=5 * x.nbytes,
            bars=Bars(eager=4.0, compile=1.6, bound=1.5),
        )
    )


def test_rms_norm_residual(bench, dtype):
    shape = bench.shape(**SHAPES)
    rms_norm = bench.op("rms_norm", needs="residual")
    x, residual, weight = (bench.normal(size, dtype) for size in (shape, shape, shape[1:]))
    bench(
        Case(
            "rms_norm + residual",
            str(list(shape)),
            (x, residual, weight),
            ours=lambda x, residual, weight: rms_norm(x, weight, residual=residual),
            unfused=unfused_residual,
            num_bytes=8 * x.nbytes,
        )
    )
