"""Speed of scaled_masked_softmax, causal.

Bytes: forward reads the lower triangle of x and writes all of y; backward reads the triangles of y and dy and writes
all of dx.
"""

import torch

from fused_megatron.benchmarking.side_by_side import Bars, Case


def unfused(x: torch.Tensor, scale: float) -> torch.Tensor:
    above = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return torch.softmax((x * scale).masked_fill(above, -torch.inf), -1)


def test_causal_softmax(bench, dtype):
    shape = bench.shape(cpu=(4, 12, 1024, 1024), gpu=(2, 32, 2048, 2048), quick=(2, 3, 9, 9))
    x = bench.normal(shape, dtype)
    softmax = bench.op("scaled_masked_softmax")
    bench(
        Case(
            "scaled_masked_softmax",
            f"{list(shape)} causal",
            (x, 0.125),
            ours=lambda x, scale: softmax(x, scale=scale, causal=True),
            unfused=unfused,
            num_bytes=x.nbytes * 7 // 2,
            bars=Bars(eager=2.0, compile=1.2, bound=1.5),
        )
    )
