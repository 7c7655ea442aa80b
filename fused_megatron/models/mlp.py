"""The two-layer GeLU MLP of a transformer block, its width split over tensor-parallel ranks."""

from typing import Any

import torch
from torch import nn

from fused_megatron import ops
from fused_megatron.collectives import Group
from fused_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """projection(gelu(expansion(x))), with the bias of the expansion fused into the GeLU.

    x [S, B, H] -> [S, B, F / R] -> [S, B, H].

    Args:
        hidden_size: H.
        ffn_hidden_size: F; must be divisible by the size R of tp_group.
        tp_group: tensor-parallel group; None means one rank.
        sequence_parallel: x and the result are sequence shards [S / R, B, H].
        init_std, output_init_std: standard deviations of the initial weights.

    Communication:
        As SelfAttention.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        tp_group: Group,
        sequence_parallel: bool = False,
        init_std: float = 0.02,
        output_init_std: float = 0.02,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        layout: dict[str, Any] = {
            "tp_group": tp_group,
            "sequence_parallel": sequence_parallel,
            "dtype": dtype,
            "device": device,
        }
        self.expansion = ColumnParallelLinear(
            hidden_size, ffn_hidden_size, skip_bias_add=True, init_std=init_std, **layout
        )
        self.projection = RowParallelLinear(ffn_hidden_size, hidden_size, init_std=output_init_std, **layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [S, B, H], or [S / R, B, H] under sequence parallelism, to the same shape."""
        hidden_shard_f, bias_shard_f = self.expansion(x)
        return self.projection(ops.bias_gelu(hidden_shard_f, bias_shard_f))
