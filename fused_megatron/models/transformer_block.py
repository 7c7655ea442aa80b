"""One pre-norm transformer block."""

from typing import Any

import torch
from torch import nn

from fused_megatron.collectives import Group
from fused_megatron.config import GPTConfig
from fused_megatron.models.attention import SelfAttention
from fused_megatron.models.mlp import MLP
from fused_megatron.tensor_parallel import LayerNorm


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); [S, B, H] to [S, B, H].

    Communication:
        2 all-reduces of S B H elements forward and 2 backward; under sequence parallelism 2 all-gathers and
        2 reduce-scatters forward, the same backward with 2 more all-gathers that restore what was not kept,
        and small all-reduces (2 H elements per norm, H per output bias) of replicated parameters' gradients.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        tp_group: Group,
        sequence_parallel: bool = False,
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
        # The residual stream sums 2 num_layers outputs: the usual GPT-2 scaling keeps its variance.
        std = {"init_std": config.init_std, "output_init_std": config.init_std / (2 * config.num_layers) ** 0.5}
        self.attention_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **layout)
        self.attention = SelfAttention(config.hidden_size, config.num_heads, **std, **layout)
        self.mlp_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **layout)
        self.mlp = MLP(config.hidden_size, config.ffn_size, **std, **layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [S, B, H], or [S / R, B, H] under sequence parallelism, to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))
