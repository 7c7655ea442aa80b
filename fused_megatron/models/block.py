"""One pre-norm transformer block."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_megatron import ops
from fused_megatron.checks import check_divisible
from fused_megatron.collectives import Group, group_size
from fused_megatron.config import GPTConfig
from fused_megatron.models.attention import ParallelSelfAttention, Tables
from fused_megatron.models.dropout import DropoutMasks
from fused_megatron.models.feed_forward import ParallelMLP
from fused_megatron.tensor_parallel import (
    ColumnParallelLinear,
    LayerNorm,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)

# The places of a block that drop something, in the order of its masks.
DROPOUT_PLACES = ("attention.probabilities", "attention", "mlp")


class TransformerBlock(nn.Module):
    """x + dropout(attention(norm(x))), then x + dropout(mlp(norm(x))); [S, B, H] to [S, B, H].

    With post_norm norm(x + dropout(attention(x))), then norm(x + dropout(mlp(x))). The output bias, the dropout and
    the residual addition are one op.

    Args:
        config: sizes and forms.
        causal: no position sees a later one.
        post_norm: norms behind the additions, not before attention and MLP.
        tp_group: tensor-parallel group; None means one rank.
        sequence_parallel: x and the result are sequence shards [S / R, B, H].

    Communication:
        2 all-reduces of S B H elements forward and 2 backward; under sequence parallelism 2 all-gathers and
        2 reduce-scatters forward, the same backward with 2 more all-gathers that restore what was not kept,
        and small all-reduces (2 H elements per norm, H per output bias) of replicated parameters' gradients.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        causal: bool = True,
        post_norm: bool = False,
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
        # Before any layer measures what overlap costs its group: sizes that do not fit start no collective.
        check_divisible("ffn_hidden_size", config.ffn_size, "tensor_parallel_size", group_size(tp_group))
        # The residual stream sums 2 num_layers outputs: the usual GPT-2 scaling keeps its variance.
        std = {"init_std": config.init_std, "output_init_std": config.init_std / (2 * config.num_layers) ** 0.5}
        self.post_norm = post_norm
        self.hidden_dropout = config.hidden_dropout
        self.attention_norm = norm_of(config, **layout)
        self.attention = ParallelSelfAttention(
            config.hidden_size, config.num_heads, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim,
            bias=config.linear_biases, qkv_bias=config.qkv_bias, causal=causal, sliding_window=config.sliding_window,
            query_key_norm_eps=config.layer_norm_eps if config.query_key_norm else None, skip_bias_add=True,
            attention_dropout=config.attention_dropout, recompute=config.recompute == "selective", **std, **layout,
        )  # fmt: skip
        self.mlp_norm = norm_of(config, **layout)
        self.mlp = ParallelMLP(
            config.hidden_size, config.ffn_size, activation=config.activation, bias=config.linear_biases,
            skip_bias_add=True, **std, **layout,
        )  # fmt: skip

    def forward(
        self,
        x: torch.Tensor,
        *,
        rotary: Tables | None = None,
        dropout: DropoutMasks | None = None,
        hidden_keys: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [S, B, H], or [S / R, B, H] under sequence parallelism, to the same shape.

        Args:
            x: the residual stream.
            rotary, hidden_keys: as ParallelSelfAttention.forward.
            dropout: masks of the DROPOUT_PLACES; None drops nothing.
        """
        inputs: dict[str, Any] = {"rotary": rotary, "dropout": dropout, "hidden_keys": hidden_keys}
        if self.post_norm:
            x = self.attention_norm(self._add(1, self.attention(x, **inputs), x, dropout))
            return self.mlp_norm(self._add(2, self.mlp(x), x, dropout))
        x = self._add(1, self.attention(self.attention_norm(x), **inputs), x, dropout)
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


def run_blocks(
    blocks: Iterable[nn.Module], x: torch.Tensor, *, recompute: bool, dropout: DropoutMasks | None, **inputs: Any
) -> torch.Tensor:
    """x through the blocks, one after the other.

    Args:
        blocks: in their order.
        x: the residual stream.
        recompute: keep the input of every block alone, and compute it again in backward.
        dropout: masks of the DROPOUT_PLACES of all blocks; None drops nothing.
        inputs: of every block.
    """
    places = len(DROPOUT_PLACES)
    for i, block in enumerate(blocks):
        masks = None if dropout is None else dropout.rows(i * places, (i + 1) * places)
        if recompute and torch.is_grad_enabled():
            # Nothing in a block draws from torch's generators, so their state need not be kept.
            x = checkpoint(block, x, dropout=masks, **inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, dropout=masks, **inputs)
    return x


def reset_layers(model: nn.Module, seed: int) -> None:
    """Draw the weight of every layer from (seed, its name in the model); norms are 1, biases 0."""
    for name, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            module.reset_parameters(seed, f"{name}.weight")
        elif isinstance(module, LayerNorm | RMSNorm):
            module.reset_parameters()
