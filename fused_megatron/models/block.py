"""The transformer block, and a loop that runs all blocks of a model."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_megatron import ops
from fused_megatron.checks import check_divisible, check_one_of
from fused_megatron.collectives import group_size
from fused_megatron.config import TransformerConfig
from fused_megatron.expert_parallel import ExpertMLP
from fused_megatron.mesh import ParallelLayout
from fused_megatron.models.all_heads_norm import AllHeadsRMSNorm
from fused_megatron.models.attention import ParallelSelfAttention, Tables
from fused_megatron.models.dropout import DropoutMasks
from fused_megatron.models.feed_forward import FEED_FORWARDS
from fused_megatron.models.key_value_cache import BlockCache
from fused_megatron.models.mixture_of_experts import MixtureOfExperts, SharedExpertGate
from fused_megatron.models.residual_stream import OpenSum, closed, norm_and_stream
from fused_megatron.models.router import ExpertRouter
from fused_megatron.modules.auxiliary_loss import WithAuxiliaryLoss, split_auxiliary_loss
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.sharding import SequencePartition
from fused_megatron.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
    VocabParallelEmbedding,
)

# The dropout sites of a block, in the order of its masks.
DROPOUT_SITES = ("attention.probabilities", "attention", "mlp", "mlp.router")
_ROUTER_SITE = DROPOUT_SITES.index("mlp.router")


class TransformerBlock(nn.Module):
    """Transformer block: x + dropout(attention(norm(x))), then x + dropout(mlp(norm(x))); [S, B, H] to [S, B, H].

    With post_norm: norm(x + dropout(attention(x))), then norm(x + dropout(mlp(x))). One op adds the output bias, drops
    elements and adds the residual. Without bias and dropout the norm that follows adds the residual, and the norm's
    backward adds the gradient of the residual stream to its own: one rounding for both.

    Args:
        config: sizes and options; config.feed_forward names the feed-forward, an MLP by default.
        layout: how the block is cut over ranks; under sequence parallelism x and the result are sequence shards
            [S / R, B, H].
        index: of the block in the model; config.has_experts decides by it whether the feed-forward has experts.
        post_norm: put the norms after the residual additions, not before attention and MLP.
        dtype, device: of the parameters.

    Raises:
        InputError: heads or an ffn_hidden_size that cannot be divided over the ranks; raised before any communication.

    Communication:
        2 all-reduces of S B H elements forward and 2 backward. Under sequence parallelism 2 all-gathers and
        2 reduce-scatters forward, the same backward, 2 more all-gathers backward (the gathered inputs are not kept),
        and small all-reduces (2 H elements per norm, H per output bias) of the gradients of replicated parameters.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layout: ParallelLayout,
        index: int = 0,
        post_norm: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        kind = "experts" if config.has_experts(index) else config.feed_forward
        # First of all, since layers measure the cost of overlap in their group: wrong sizes start no collective.
        if kind != "experts":
            check_divisible("ffn_hidden_size", config.ffn_size, "tensor_parallel_size", group_size(layout.tp_group))
        check_one_of("feed_forward", kind, list(FEED_FORWARDS))
        self.post_norm = post_norm
        self.hidden_dropout = config.hidden_dropout
        self.attention_norm = norm_of(config, layout=layout, dtype=dtype, device=device)
        self.attention = ParallelSelfAttention(config, layout=layout, skip_bias_add=True, dtype=dtype, device=device)
        self.mlp_norm = norm_of(config, layout=layout, dtype=dtype, device=device)
        self.mlp = FEED_FORWARDS[kind](config, layout=layout, dtype=dtype, device=device)

    def forward(
        self,
        x: torch.Tensor | OpenSum,
        mask: AttentionMask,
        *,
        rotary: Tables | None = None,
        dropout: DropoutMasks | None = None,
        partition: SequencePartition | None = None,
        cache: BlockCache | None = None,
        may_leave_open: bool = False,
    ) -> torch.Tensor | OpenSum | WithAuxiliaryLoss:
        """Run the block.

        Args:
            x: the residual stream [S, B, H], or [S / R, B, H] under sequence parallelism; or an OpenSum.
            mask, rotary, partition, cache: as in ParallelSelfAttention.forward.
            dropout: masks of the DROPOUT_SITES; None: drop nothing.
            may_leave_open: a norm follows, which takes an OpenSum.

        Returns:
            The residual stream, of the shape of x; WithAuxiliaryLoss if the feed-forward returns it.
        """
        result: torch.Tensor | OpenSum
        if self.post_norm:
            stream = closed(x)
            attended = self.attention(stream, mask, rotary=rotary, dropout=dropout, partition=partition, cache=cache)
            stream = self.attention_norm(self._add(1, attended, stream, dropout))
            fed = self._feed_forward(stream, dropout, partition)
            result = self.mlp_norm(self._add(2, fed.output, stream, dropout))
        else:
            normed, stream = norm_and_stream(self.attention_norm, x)
            attended = self.attention(normed, mask, rotary=rotary, dropout=dropout, partition=partition, cache=cache)
            normed, stream = norm_and_stream(self.mlp_norm, self._open_sum(1, attended, stream, dropout))
            fed = self._feed_forward(normed, dropout, partition)
            result = self._open_sum(2, fed.output, stream, dropout)
            result = result if may_leave_open else closed(result)
        return result if fed.auxiliary_loss is None and fed.report is None else fed._replace(output=result)

    def _feed_forward(
        self, x: torch.Tensor, dropout: DropoutMasks | None, partition: SequencePartition | None
    ) -> WithAuxiliaryLoss:
        if isinstance(self.mlp, MixtureOfExperts):
            masks = None if dropout is None else dropout.rows(_ROUTER_SITE, _ROUTER_SITE + 1)
            returned = self.mlp(x, dropout=masks, partition=partition)
        else:
            returned = self.mlp(x)
        return returned if isinstance(returned, WithAuxiliaryLoss) else WithAuxiliaryLoss(returned, None)

    def _open_sum(
        self,
        site: int,
        output: tuple[torch.Tensor, torch.Tensor | None],
        x: torch.Tensor,
        dropout: DropoutMasks | None,
    ) -> torch.Tensor | OpenSum:
        """Leave the addition open if it is plain, else add."""
        y, bias = output
        plain = bias is None and (dropout is None or self.hidden_dropout == 0.0) and y.dtype == x.dtype
        return OpenSum(x, y) if plain else self._add(site, output, x, dropout)

    def _add(
        self,
        site: int,
        output: tuple[torch.Tensor, torch.Tensor | None],
        x: torch.Tensor,
        dropout: DropoutMasks | None,
    ) -> torch.Tensor:
        y, bias = output
        if dropout is None or self.hidden_dropout == 0.0:
            return ops.bias_dropout_add(y, bias, x, 0.0)
        return dropout.add(site, y, bias, x, self.hidden_dropout)


def norm_of(
    config: TransformerConfig, *, layout: ParallelLayout, dtype: torch.dtype | None, device: torch.device | None
) -> SequenceParallelLayerNorm | SequenceParallelRMSNorm:
    """Return a new norm over the hidden dim, of the kind that config.normalization names."""
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
    recompute: int,
    rotary: Tables | None,
    dropout: DropoutMasks | None,
    partition: SequencePartition | None = None,
    caches: Sequence[BlockCache] | None = None,
) -> tuple[torch.Tensor | OpenSum, torch.Tensor | None]:
    """Run the blocks in their order; return x and the sum of their auxiliary losses (None if no block has one).

    The last addition of x may be open.

    Args:
        blocks: in their order.
        x: the residual stream.
        mask, rotary, partition: for every block.
        recompute: number of blocks, the first ones, of which only the input is kept: they run again in backward.
        dropout: masks of the DROPOUT_SITES of all blocks; None: drop nothing.
        caches: for each block the keys and values of earlier tokens; None: x has all tokens.
    """
    sites = len(DROPOUT_SITES)
    total = None
    stream: torch.Tensor | OpenSum = x
    for i, block in enumerate(blocks):
        masks = None if dropout is None else dropout.rows(i * sites, (i + 1) * sites)
        if i < recompute and torch.is_grad_enabled():
            # A block never draws from torch's generators, so their state need not be kept.
            returned = checkpoint(
                block,
                closed(stream),  # one tensor to keep
                mask,
                rotary=rotary,
                dropout=masks,
                partition=partition,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            cache = None if caches is None else caches[i]
            returned = block(
                stream,
                mask,
                rotary=rotary,
                dropout=masks,
                partition=partition,
                cache=cache,
                may_leave_open=True,
            )
        # Here, and not in the block: a recomputed block runs twice.
        if isinstance(returned, WithAuxiliaryLoss) and returned.report is not None:
            router = block.get_submodule("mlp.router")
            router.get_buffer("sums").add_(returned.report)
        stream, loss = split_auxiliary_loss(returned)
        if loss is not None:
            total = loss if total is None else total + loss
    return stream, total


def reset_layers(model: nn.Module, seed: int) -> None:
    """Draw the weight of every layer from (seed, its name in the model); set norms to 1 and biases to 0."""
    for name, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            module.reset_parameters(seed, f"{name}.weight")
        elif isinstance(module, ExpertMLP):
            module.reset_parameters(seed, name)
        elif isinstance(module, ExpertRouter | SharedExpertGate):
            module.reset_parameters(seed, f"{name}.weight")
        elif isinstance(module, SequenceParallelLayerNorm | SequenceParallelRMSNorm | AllHeadsRMSNorm):
            module.reset_parameters()
