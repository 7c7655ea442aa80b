"""One pre-norm transformer block."""

from typing import Any

import torch
from torch import nn

from fused_megatron import ops
from fused_megatron.collectives import Group
from fused_megatron.config import GPTConfig
from fused_megatron.models.attention import ParallelSelfAttention, Tables
from fused_megatron.models.dropout import DropoutMasks
from fused_megatron.models.mlp import ParallelMLP
from fused_megatron.tensor_parallel import LayerNorm, RMSNorm

# The places of a block that drop something, in the order of its masks.
DROPOUT_PLACES = ("attention.probabilities", "attention", "mlp")


class TransformerBlock(nn.Module):
    """x + dropout(attention(norm(x))), then x + dropout(mlp(norm(x))); [S, B, H] to [S, B, H].

    The output bias, the dropout and the residual addition are one op.

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
        self.hidden_dropout = config.hidden_dropout
        self.attention_norm = norm_of(config, **layout)
        self.attention = ParallelSelfAttention(
            config.hidden_size, config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
            bias=config.linear_biases, qkv_bias=config.qkv_bias, sliding_window=config.sliding_window,
            query_key_norm_eps=config.layer_norm_eps if config.query_key_norm else None, skip_bias_add=True,
            attention_dropout=config.attention_dropout, recompute=config.recompute == "selective", **std, **layout,
        )  # fmt: skip
        self.mlp_norm = norm_of(config, **layout)
        self.mlp = ParallelMLP(
            config.hidden_size, config.ffn_size, activation=config.activation, bias=config.linear_biases,
            skip_bias_add=True, **std, **layout,
        )  # fmt: skip

    def forward(
        self, x: torch.Tensor, *, rotary: Tables | None = None, dropout: DropoutMasks | None = None
    ) -> torch.Tensor:
        """x [S, B, H], or [S / R, B, H] under sequence parallelism, to the same shape.

        Args:
            x: the residual stream.
            rotary: as ParallelSelfAttention.forward.
            dropout: masks of the DROPOUT_PLACES; None drops nothing.
        """
        x = self._add(1, self.attention(self.attention_norm(x), rotary=rotary, dropout=dropout), x, dropout)
        return self._add(2, self.mlp(self.mlp_norm(x)), x, dropout)

    def _add(
        self,
        place: int,
        output: tuple[torch.Tensor, torch.Tensor | None],
        x: torch.Tensor,
        dropout: DropoutMasks | None,
    ) -> torch.Tensor:
        y, bias = output
        if dropout is None or self.hidden_dropout == 0.0:
            return ops.bias_dropout_add(y, bias, x, 0.0)
        return dropout.add(place, y, bias, x, self.hidden_dropout)


def norm_of(config: GPTConfig, **layout: Any) -> LayerNorm | RMSNorm:
    """The norm that the config names, over the hidden dim."""
    if config.normalization == "rms_norm":
        return RMSNorm(config.hidden_size, eps=config.layer_norm_eps, **layout)
    return LayerNorm(config.hidden_size, eps=config.layer_norm_eps, **layout)
