"""Self-attention whose heads are sharded over the tensor-parallel ranks."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_megatron import ops
from fused_megatron.checks import check, check_divisible, check_multiple_or_divisor
from fused_megatron.collectives import group_rank, group_size
from fused_megatron.config import TransformerConfig
from fused_megatron.context_parallel import context_parallel_attention
from fused_megatron.mesh import ParallelLayout
from fused_megatron.models.all_heads_norm import AllHeadsRMSNorm, normalise_all_heads
from fused_megatron.models.dropout import DropoutMasks
from fused_megatron.models.key_value_cache import BlockCache
from fused_megatron.ops.attention import AttentionMask, attend
from fused_megatron.ops.rotary_query_key_value import rotary_query_key_value, split_query_key_value
from fused_megatron.ops.visible_pairs import PairTile
from fused_megatron.sharding import SequencePartition, used_by_parts
from fused_megatron.tensor_parallel import (
    ColumnParallelLinear,
    OutputPart,
    RowParallelLinear,
    SequenceParallelRMSNorm,
    StackedColumnParallelLinear,
)

Tables = tuple[torch.Tensor, torch.Tensor]


class ParallelSelfAttention(nn.Module):
    """Self-attention with ops.attend between a query-key-value layer and an output projection.

    x [S, B, H] -> query [S, B, N / R, D], key and value [S, B, max(1, G / R), D] -> [S, B, H].

    With N key-value heads (MHA) the rows of the fused weight are ordered head by head, and (query, key, value) within a
    head. With fewer (GQA, MQA) query, key and value are three stacked weights, each sharded by heads. With fewer
    key-value heads than ranks, R / G neighbouring ranks hold the same head and sum its gradient.

    Args:
        config: sizes and options. num_heads N must be divisible by the size R of the tensor-parallel group, and one of
            num_kv_heads G and R must divide the other.
        layout: how the layer is cut over ranks; under sequence parallelism x and the result are sequence shards
            [S / R, B, H]. With context parallelism S is the number of this rank's positions.
        skip_bias_add: leave the bias of the projection to a following fused op; forward returns (y, bias).
        dtype, device: of the parameters.

    Raises:
        InputError: heads that cannot be divided over the ranks.

    Communication:
        One all-reduce of S B H elements forward and one backward (each an all-gather and a reduce-scatter under
        sequence parallelism). With fewer key-value heads than ranks, one all-reduce backward of their weights,
        2 G D (H + 1) elements. With query_key_norm, one all-reduce backward of 2 D elements; over all heads, as
        normalise_all_heads. With context parallelism also as context_parallel_attention.

    Memory:
        As ops.attend with N / R heads. With config.recompute="selective", attention between the two projections is not
        kept but computed again in backward.
        With attention_dropout, B N / R S S probabilities are held, and the same number after dropout: the masks of
        torch's attention kernels depend on the layout. With attention_dropout_kernel="fast" they are used, and a GPU
        holds no probabilities.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layout: ParallelLayout,
        skip_bias_add: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        ranks = group_size(layout.tp_group)
        check_divisible("num_heads", config.num_heads, "tensor_parallel_size", ranks)
        check_multiple_or_divisor("num_kv_heads", config.kv_heads, "tensor_parallel_size", ranks)
        check(
            config.attention_dropout_kernel == "exact" or group_size(layout.cp_group) == 1,
            "attention_dropout_kernel='fast' must be 'exact' with context parallelism, which attends tile by tile",
        )
        self.head_dim, self.num_heads, self.num_kv_heads = config.head_size, config.num_heads, config.kv_heads
        self.heads_shard, self.kv_heads_shard = self.num_heads // ranks, max(1, self.num_kv_heads // ranks)
        self.first_head = group_rank(layout.tp_group) * self.heads_shard
        self.drops_in_kernel = config.attention_dropout_kernel == "fast"
        self.attention_dropout, self.recompute = config.attention_dropout, config.recompute == "selective"
        self.cp_group, self.context_parallel_method = layout.cp_group, layout.context_parallel_method
        self.query_key_value = self._new_query_key_value(config, layout, dtype, device)
        self.query_norm: AllHeadsRMSNorm | SequenceParallelRMSNorm | None = None
        self.key_norm: AllHeadsRMSNorm | SequenceParallelRMSNorm | None = None
        if config.query_key_norm and config.query_key_norm_over == "all_heads":
            check_divisible("num_kv_heads", config.kv_heads, "tensor_parallel_size", ranks)
            self.query_norm, self.key_norm = (
                AllHeadsRMSNorm(
                    heads,
                    config.head_size,
                    config.layer_norm_eps,
                    tp_group=layout.tp_group,
                    dtype=dtype,
                    device=device,
                )
                for heads in (self.num_heads, self.num_kv_heads)
            )
        elif config.query_key_norm:
            # tp_group=None: these norms would sum their gradients only under sequence parallelism, but every rank has
            # other heads in any case. forward() sums the gradients.
            self.query_norm, self.key_norm = (
                SequenceParallelRMSNorm(
                    config.head_size, config.layer_norm_eps, tp_group=None, dtype=dtype, device=device
                )
                for _ in range(2)
            )
        self.projection = RowParallelLinear(
            self.num_heads * self.head_dim,
            config.hidden_size,
            config.linear_biases,
            skip_bias_add=skip_bias_add,
            init_std=config.output_init_std,
            tp_group=layout.tp_group,
            sequence_parallel=layout.sequence_parallel,
            overlap=layout.overlap,
            dtype=dtype,
            device=device,
        )

    def _new_query_key_value(
        self,
        config: TransformerConfig,
        layout: ParallelLayout,
        dtype: torch.dtype | None,
        device: torch.device | None,
    ) -> ColumnParallelLinear:
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        bias = config.linear_biases if config.qkv_bias is None else config.qkv_bias
        if self.num_kv_heads == self.num_heads:
            return ColumnParallelLinear(
                config.hidden_size,
                3 * width,
                bias,
                init_std=config.init_std,
                tp_group=layout.tp_group,
                sequence_parallel=layout.sequence_parallel,
                overlap=layout.overlap,
                dtype=dtype,
                device=device,
            )
        copies = max(1, group_size(layout.tp_group) // self.num_kv_heads)
        return StackedColumnParallelLinear(
            config.hidden_size,
            [OutputPart("query", width), OutputPart("key", kv_width, copies), OutputPart("value", kv_width, copies)],
            bias,
            init_std=config.init_std,
            tp_group=layout.tp_group,
            sequence_parallel=layout.sequence_parallel,
            overlap=layout.overlap,
            dtype=dtype,
            device=device,
        )

    def forward(
        self,
        x: torch.Tensor,
        mask: AttentionMask,
        *,
        rotary: Tables | None = None,
        dropout: DropoutMasks | None = None,
        partition: SequencePartition | None = None,
        cache: BlockCache | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Attend: return y, of the shape of x, or (y, bias) with skip_bias_add.

        Args:
            x: activations [S, B, H], or [S / R, B, H] under sequence parallelism.
            mask: which keys each query attends to.
            rotary: (cos, sin) to rotate queries and keys, [at least S, Drot / 2] each, or [S, B, Drot / 2] with a row
                for each token; None: no rotation.
            dropout: masks whose first row is for attention_dropout; None: drop nothing.
            partition: the positions of each context-parallel rank; the rows of x are this rank's positions. None: x has
                all positions.
            cache: keys and values of earlier tokens, which also stores keys and values of x; None: x has all tokens.
        """
        query, key, value = self._rotated_query_key_value(self.query_key_value(x), rotary)
        if cache is not None:
            context = cache.attend(query, key, value, mask).flatten(2)
        elif self.recompute and torch.is_grad_enabled():
            # _attend never draws from torch's generators, so their state need not be kept.
            context = checkpoint(
                self._attend, query, key, value, mask, dropout, partition, use_reentrant=False, preserve_rng_state=False
            )
        else:
            context = self._attend(query, key, value, mask, dropout, partition)
        return self.projection(context)

    def _rotated_query_key_value(self, qkv: torch.Tensor, rotary: Tables | None) -> tuple[torch.Tensor, ...]:
        """Return normalised and rotated query, key and value, [S, B, heads of this rank, D]; qkv may be overwritten."""
        heads: dict[str, Any] = {
            "num_heads": self.heads_shard,
            "num_kv_heads": self.kv_heads_shard,
            "head_by_head": self.num_kv_heads == self.num_heads,
        }
        shape = qkv.shape[:2]
        if rotary is not None and rotary[0].dim() == 3:  # the S B tokens as one sequence
            qkv, rotary = qkv.view(-1, 1, qkv.shape[2]), (rotary[0].flatten(0, 1), rotary[1].flatten(0, 1))
        if isinstance(self.query_norm, AllHeadsRMSNorm) and isinstance(self.key_norm, AllHeadsRMSNorm):
            query, key, value = split_query_key_value(qkv, **heads)
            query, key = normalise_all_heads(query, key, self.query_norm, self.key_norm)
            if rotary is not None:
                query, rotated = ops.rotary_embedding(query, key, *rotary)
                assert rotated is not None
                key = rotated
        elif self.query_norm is not None and self.key_norm is not None:
            q_weight, k_weight = used_by_parts(
                (self.query_norm.weight, self.key_norm.weight), self.query_key_value.tp_group
            )
            cos, sin = rotary or (None, None)
            eps = self.query_norm.eps
            assert eps is not None
            query, key, value = ops.query_key_norm(qkv, q_weight, k_weight, cos, sin, eps=eps, **heads)
        elif rotary is not None:
            query, key, value = rotary_query_key_value(qkv, *rotary, **heads)
        else:
            query, key, value = split_query_key_value(qkv, **heads)
        return tuple(x.view(*shape, *x.shape[2:]) for x in (query, key, value))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: AttentionMask,
        dropout: DropoutMasks | None,
        partition: SequencePartition | None,
    ) -> torch.Tensor:
        """Return the context [S, B, N D / R] of query, key and value, [S, B, heads of this rank, D] each."""
        drop = None
        if dropout is not None and self.attention_dropout > 0.0:
            if self.drops_in_kernel:
                in_kernel = dropout.in_kernel(0, self.attention_dropout, self.first_head)
                return attend(query, key, value, mask, dropout=in_kernel).flatten(2)
            drop = partial(self._drop, dropout)
        if partition is None or self.cp_group is None:
            return attend(query, key, value, mask, dropout=drop).flatten(2)
        context = context_parallel_attention(
            query,
            key,
            value,
            mask,
            partition=partition,
            method=self.context_parallel_method,
            group=self.cp_group,
            dropout=drop,
        )
        return context.flatten(2)

    def _drop(
        self, dropout: DropoutMasks, probabilities: torch.Tensor, tile: PairTile, first_head: int = 0
    ) -> torch.Tensor:
        """Drop attention probabilities of this rank's heads from first_head on."""
        return dropout.drop_heads(
            probabilities,
            tile,
            which=0,
            p=self.attention_dropout,
            first_head=self.first_head + first_head,
            heads=self.num_heads,
        )
