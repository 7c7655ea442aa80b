"""Speed and memory of linear_cross_entropy. Its bar is memory: the logits never exist whole.

Bytes: it reads hidden and weight and writes their gradients, which is little compared with the products' arithmetic.
"""

import torch
import torch.nn.functional as F

from fused_megatron.benchmarking.side_by_side import Bars, Case


def unfused(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def test_linear_cross_entropy(bench, dtype):
    tokens, hidden_size, vocab_size = bench.shape(cpu=(4096, 768, 50304), gpu=(8192, 4096, 128256), quick=(9, 16, 41))
    hidden = bench.normal((tokens, hidden_size), dtype)
    weight = (torch.randn(vocab_size, hidden_size, device=hidden.device) / hidden_size**0.5).to(dtype).requires_grad_()
    target = torch.randint(0, vocab_size, (tokens,), device=hidden.device)
    bench(
        Case(
            "linear_cross_entropy",
            f"{tokens} tokens, {hidden_size} -> {vocab_size}",
            (hidden, weight, target),
            ours=bench.op("linear_cross_entropy"),
            unfused=unfused,
            num_bytes=2 * (hidden.nbytes + weight.nbytes),
            large=True,
            compute_bound=True,
            bars=Bars(eager=1.0, compile=1.0, memory=1 / 8),
        )
    )
