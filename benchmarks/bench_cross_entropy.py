"""Speed of cross_entropy. Bytes: forward reads each logit; backward reads it again and writes its gradient."""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.benchmarking.side_by_side import Bars, Case


def unfused(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, target)


@pytest.mark.parametrize("size", ["few", "many"])
def test_cross_entropy(bench, dtype, size):
    if size == "few":
        shape = bench.shape(cpu=(1024, 50304), gpu=(8192, 32000), quick=(6, 40))
    else:
        shape = bench.shape(cpu=(2048, 50304), gpu=(8192, 128256), quick=(9, 41))
    logits = bench.normal(shape, dtype)
    target = torch.randint(0, shape[1], shape[:1], device=logits.device)
    bench(
        Case(
            "cross_entropy",
            str(list(shape)),
            (logits, target),
            ours=bench.op("cross_entropy"),
            unfused=unfused,
            num_bytes=3 * logits.nbytes,
            large=size == "many",
            bars=Bars(eager=2.0, compile=1.75, bound=1.4),
        )
    )
