"""One transformer block, and what is done with all blocks of a model."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_megatron import ops
from fused_megatron.checks import check_divisible, check_one_of
from fused_megatron.collectives import group_size
from fused_megatron.config import TransformerConfig
from fused_megatron.mesh import ParallelLayout
from fused_megatron.models.attention import ParallelSelfAttention, Tables
from fused_megatron.models.dropout import DropoutMasks
from fused_megatron.models.feed_forward import FEED_FORWARDS
from fused_megatron.modules.auxiliary_loss import WithAuxiliaryLoss, split_auxiliary_loss
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
    VocabParallelEmbedding,
)

# The places of a block that drop something, in the order of its masks.
DROPOUT_PLACES = ("attention.probabilities", "attention", "mlp")


class TransformerBlock(nn.Module):
    """x + dropout(attention(norm(x))), then x + dropout(mlp(norm(x))); [S, B, H] to [S, B, H].

    With post_norm norm(x + dropout(attention(x))), then norm(x + dropout(mlp(x))). The output bias, the dropout and
    the residual addition are one op.

    Args:
        config: sizes and forms; config.feed_forward names what stands in the place of the MLP.
        layout: how it is cut over ranks; under sequence parallelism x and the result are sequence shards [S / R, B, H].
        post_norm: norms behind the additions, not before attention and MLP.
        dtype, device: of the parameters.

    Raises:
        InputError: heads or a width that the ranks do not divide, before anything is communicated.

    Communication:
        2 all-reduces of S B H elements forward and 2 backward; under sequence parallelism 2 all-gathers and
        2 reduce-scatters forward, the same backward with 2 more all-gathers that restore what was not kept,
        and small all-reduces (2 H elements per norm, H per output bias) of replicated parameters' gradients.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layout: ParallelLayout,
        post_norm: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        # Before any layer measures what overlap costs its group: sizes that do not fit start no collective.
        check_divisible("ffn_hidden_size", config.ffn_size, "tensor_parallel_size", group_size(layout.tp_group))
        check_one_of("feed_forward", config.feed_forward, list(FEED_FORWARDS))
        self.post_norm = post_norm
        self.hidden_dropout = config.hidden_dropout
        self.attention_norm = norm_of(config, layout=layout, dtype=dtype, device=device)
        self.attention = ParallelSelfAttention(config, layout=layout, skip_bias_add=True, dtype=dtype, device=device)
        self.mlp_norm = norm_of(config, layout=layout, dtype=dtype, device=device)
        self.mlp = FEED_FORWARDS[config.feed_forward](config, layout=layout, dtype=dtype, device=device)

    def forward(
        self,
        x: torch.Tensor,
        mask: AttentionMask,
        *,
        rotary: Tables | None = None,
        dropout: DropoutMasks | None = None,
    ) -> torch.Tensor | WithAuxiliaryLoss:
        """x [S, B, H], or [S / R, B, H] under sequence parallelism, to the same shape.

        Args:
            x: the residual stream.
            mask, rotary: as ParallelSelfAttention.forward.
            dropout: masks of the DROPOUT_PLACES; None drops nothing.

        Returns:
            The residual stream, with the auxiliary loss of the feed-forward where it returned one.
        """
        if self.post_norm:
            attended = self.attention(x, mask, rotary=rotary, dropout=dropout)
            x = self.attention_norm(self._add(1, attended, x, dropout))
            output, loss = split_auxiliary_loss(self.mlp(x))
            x = self.mlp_norm(self._add(2, output, x, dropout))
        else:
            attended = self.attention(self.attention_norm(x), mask, rotary=rotary, dropout=dropout)
            x = self._add(1, attended, x, dropout)
            output, loss = split_auxiliary_loss(self.mlp(self.mlp_norm(x)))
            x = self._add(2, output, x, dropout)
        return x if loss is None else WithAuxiliaryLoss(x, loss)

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


def norm_of(
    config: TransformerConfig, *, layout: ParallelLayout, dtype: torch.dtype | None, device: torch.device | None
) -> SequenceParallelLayerNorm | SequenceParallelRMSNorm:
    """The norm that the config names, over the hidden dim."""
    norm = SequenceParallelRMSNorm if config.normalization == "rms_norm" else SequenceParallelLayerNorm
    return norm(
        config.hidden_size,
        eps=config.layer_norm_eps,
        tp_group=layout.tp_group,
        sequence_parallel=layout.sequence_parallel,
        dtype=dtype,
        device=device,
    )


def run_blocks(
    blocks: Iterable[nn.Module],
    x: torch.Tensor,
    mask: AttentionMask,
    *,
    recompute: bool,
    rotary: Tables | None,
    dropout: DropoutMasks | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x through the blocks, one after the other, and the sum of their auxiliary losses; None where there is none.

    Args:
        blocks: in their order.
        x: the residual stream.
        mask, rotary: of every block.
        recompute: keep the input of every block alone, and compute it again in backward.
        dropout: masks of the DROPOUT_PLACES of all blocks; None drops nothing.
    """
    places, total = len(DROPOUT_PLACES), None
    for i, block in enumerate(blocks):
        masks = None if dropout is None else dropout.rows(i * places, (i + 1) * places)
        if recompute and torch.is_grad_enabled():
            # Nothing in a block draws from torch's generators, so their state need not be kept.
            returned = checkpoint(
                block, x, mask, rotary=rotary, dropout=masks, use_reentrant=False, preserve_rng_state=False
            )
        else:
            returned = block(x, mask, rotary=rotary, dropout=masks)
        x, loss = split_auxiliary_loss(returned)
        if loss is not None:
            total = loss if total is None else total + loss
    return x, total


def reset_layers(model: nn.Module, seed: int) -> None:
    """Draw the weight of every layer from (seed, its name in the model); norms are 1, biases 0."""
    for name, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            module.reset_parameters(seed, f"{name}.weight")
        elif isinstance(module, SequenceParallelLayerNorm | SequenceParallelRMSNorm):
            module.reset_parameters()
