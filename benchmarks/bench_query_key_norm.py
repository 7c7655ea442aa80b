"""Speed of query_key_norm: RMSNorm of each query and key head of a fused product, then rotary positions.

Bytes: forward reads and writes query and key; backward reads them and the gradients of query, key and value, and writes
one gradient of the product.
"""

import torch
import torch.nn.functional as F

from fused_megatron.benchmarking.side_by_side import Bars, Case

EPS = 1e-5


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def test_query_key_norm(bench, dtype):
    seq_len, batch, heads, kv_heads, head_dim = bench.shape(
        cpu=(1024, 4, 12, 4, 64), gpu=(4096, 2, 32, 8, 128), quick=(5, 2, 3, 1, 8)
    )
    form = {"num_heads": heads, "num_kv_heads": kv_heads}
    qkv = bench.normal((seq_len, batch, (heads + 2 * kv_heads) * head_dim), dtype)
    q_weight, k_weight = (bench.normal((head_dim,), dtype) for _ in range(2))
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, device=qkv.device) / head_dim)
    angles = torch.arange(seq_len, device=qkv.device)[:, None] * frequencies
    query_key_norm = bench.op("query_key_norm")

    def unfused(qkv, q_weight, k_weight, cos, sin):
        cos, sin = (torch.cat((t, t), -1)[:, None, None].to(qkv.dtype) for t in (cos, sin))
        query, key, value = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), 2)
        query, key = F.rms_norm(query, (head_dim,), q_weight, EPS), F.rms_norm(key, (head_dim,), k_weight, EPS)
        return turned(query, cos, sin), turned(key, cos, sin), value

    normalised = qkv.nbytes * (heads + kv_heads) // (heads + 2 * kv_heads)
    bench(
        Case(
            "query_key_norm",
            f"{list(qkv.shape)}, {heads} and {kv_heads} heads",
            (qkv, q_weight, k_weight, angles.cos(), angles.sin()),
            ours=lambda qkv, *others: query_key_norm(qkv, *others, eps=EPS, **form),
            unfused=unfused,
            num_bytes=5 * normalised + 2 * (qkv.nbytes - normalised),
            bars=Bars(eager=2.0, compile=1.0, bound=1.6),
        )
    )
