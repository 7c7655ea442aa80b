"""Multi-head causal self-attention, heads split over tensor-parallel ranks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fused_megatron.checks import check_divisible
from fused_megatron.collectives import Group, group_size
from fused_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class SelfAttention(nn.Module):
    """Causal self-attention through torch's scaled_dot_product_attention.

    x [S, B, H] -> query, key, value [B, N / R, S, D] -> [S, B, H]. The rows of the fused weight are ordered
    head by head, (query, key, value) within a head, so that a shard is one block of rows at every R.

    Args:
        hidden_size: H; must be divisible by num_heads.
        num_heads: N; must be divisible by the size R of tp_group.
        tp_group: tensor-parallel group; None means one rank.
        sequence_parallel: x and the result are sequence shards [S / R, B, H].
        init_std, output_init_std: standard deviations of the initial weights.

    Communication:
        One all-reduce of S B H elements forward and one backward (all-gather + reduce-scatter each under
        sequence_parallel).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        tp_group: Group,
        sequence_parallel: bool = False,
        init_std: float = 0.02,
        output_init_std: float = 0.02,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        check_divisible("hidden_size", hidden_size, "num_heads", num_heads)
        check_divisible("num_heads", num_heads, "tensor_parallel_size", group_size(tp_group))
        self.head_dim = hidden_size // num_heads
        layout: dict[str, Any] = {
            "tp_group": tp_group,
            "sequence_parallel": sequence_parallel,
            "dtype": dtype,
            "device": device,
        }
        self.query_key_value = ColumnParallelLinear(hidden_size, 3 * hidden_size, init_std=init_std, **layout)
        self.projection = RowParallelLinear(hidden_size, hidden_size, init_std=output_init_std, **layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [S, B, H], or [S / R, B, H] under sequence parallelism, to the same shape."""
        qkv = self.query_key_value(x)
        seq_len, batch = qkv.shape[:2]
        # [S, B, N / R, 3, D] -> three views [B, N / R, S, D]
        query, key, value = qkv.view(seq_len, batch, -1, 3, self.head_dim).permute(3, 1, 2, 0, 4).unbind(0)
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.projection(context.permute(2, 0, 1, 3).reshape(seq_len, batch, -1))
