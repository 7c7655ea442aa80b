"""Speed of rotary_embedding of q and k, in the half form (the first half of a head's columns with the second).

Bytes: forward and backward each read and write q and k.
"""

import torch

from fused_megatron.benchmarking.side_by_side import Bars, Case


def unfused(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    cos, sin = (torch.cat((t, t), -1)[: q.shape[0], None, None].to(q.dtype) for t in (cos, sin))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return rotate(q), rotate(k)


def test_rotary_embedding(bench, dtype):
    seq_len, batch, heads, kv_heads, head_dim = bench.shape(
        cpu=(1024, 4, 12, 12, 64), gpu=(4096, 2, 32, 8, 128), quick=(5, 2, 3, 1, 8)
    )
    q, k = (bench.normal((seq_len, batch, n, head_dim), dtype) for n in (heads, kv_heads))
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, device=q.device) / head_dim)
    angles = torch.arange(seq_len, device=q.device)[:, None] * frequencies
    bench(
        Case(
            "rotary_embedding",
            f"{list(q.shape)}" if heads == kv_heads else f"{list(q.shape)} and {list(k.shape)}",
            (q, k, angles.cos(), angles.sin()),
            ours=bench.op("rotary_embedding"),
            unfused=unfused,
            num_bytes=4 * (q.nbytes + k.nbytes),
            bars=Bars(eager=2.0, compile=1.2, bound=1.5),
        )
    )
