"""Self-attention, causal or not, heads split over tensor-parallel ranks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fused_megatron import ops
from fused_megatron.checks import check, check_divisible, check_multiple_or_divisor
from fused_megatron.collectives import Group, group_rank, group_size, identity_all_reduce_together
from fused_megatron.models.dropout import DropoutMasks
from fused_megatron.tensor_parallel import (
    ColumnParallelLinear,
    OutputPart,
    RMSNorm,
    RowParallelLinear,
    StackedColumnParallelLinear,
)

Tables = tuple[torch.Tensor, torch.Tensor]


class ParallelSelfAttention(nn.Module):
    """Self-attention through torch's scaled_dot_product_attention.

    x [S, B, H] -> query [S, B, N / R, D], key and value [S, B, max(1, G / R), D] -> [S, B, H].

    With as many key-value heads as heads (MHA), the rows of the fused weight are ordered head by head, (query, key,
    value) within a head. With fewer (GQA, MQA) query, key and value are parts of their own, each sharded by heads;
    where they are fewer than ranks, R / G neighbouring ranks hold the same head and sum its gradient.

    Args:
        hidden_size: H; must be divisible by num_heads, where head_dim is None.
        num_heads: N; must be divisible by the size R of tp_group.
        num_kv_heads: G; N when None. It divides N, and one of G and R divides the other.
        head_dim: D; H / N when None.
        bias, qkv_bias: whether the linear layers have biases; qkv_bias, where it is not None, says it for query, key
            and value.
        query_key_norm_eps: normalize every head of queries and keys by its root mean square, before rotation; the
            weights [D] are the same for all heads.
        causal: no query sees a later key.
        sliding_window: a query sees the last so many keys up to itself; needs causal.
        attention_dropout: probability of dropping an attention probability, where forward is given masks.
        recompute: backward computes what lies between the projections again, instead of keeping it.
        tp_group: tensor-parallel group; None means one rank.
        sequence_parallel: x and the result are sequence shards [S / R, B, H].
        skip_bias_add: leave the bias of the projection to a following fused op; forward returns (y, bias).
        init_std, output_init_std: standard deviations of the initial weights.

    Communication:
        One all-reduce of S B H elements forward and one backward (all-gather + reduce-scatter each under
        sequence_parallel); with fewer key-value heads than ranks one backward of their weights, 2 G D (H + 1) elements;
        with query_key_norm_eps one backward of 2 D.

    Memory:
        With sliding_window below S, or a mask, torch's attention reads a mask of S S bytes.
        With attention_dropout (torch's attention kernels draw masks that depend on the layout) the probabilities of
        this rank's heads are computed whole: B N / R S S elements, and as many after dropout.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        qkv_bias: bool | None = None,
        query_key_norm_eps: float | None = None,
        causal: bool = True,
        sliding_window: int | None = None,
        attention_dropout: float = 0.0,
        recompute: bool = False,
        tp_group: Group,
        sequence_parallel: bool = False,
        skip_bias_add: bool = False,
        init_std: float = 0.02,
        output_init_std: float = 0.02,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        ranks, kv_heads = group_size(tp_group), num_heads if num_kv_heads is None else num_kv_heads
        if head_dim is None:
            check_divisible("hidden_size", hidden_size, "num_heads", num_heads)
            head_dim = hidden_size // num_heads
        check(causal or sliding_window is None, f"sliding_window={sliding_window} needs causal=True")
        check_divisible("num_heads", num_heads, "num_kv_heads", kv_heads)
        check_divisible("num_heads", num_heads, "tensor_parallel_size", ranks)
        check_multiple_or_divisor("num_kv_heads", kv_heads, "tensor_parallel_size", ranks)
        check(0 <= attention_dropout < 1, f"attention_dropout={attention_dropout} must lie in [0, 1)")
        self.head_dim, self.num_heads, self.num_kv_heads = head_dim, num_heads, kv_heads
        self.causal, self.sliding_window = causal, sliding_window
        self.heads_shard, self.kv_heads_shard = num_heads // ranks, max(1, kv_heads // ranks)
        self.first_head = group_rank(tp_group) * self.heads_shard
        self.attention_dropout, self.recompute = attention_dropout, recompute
        layout: dict[str, Any] = {
            "tp_group": tp_group,
            "sequence_parallel": sequence_parallel,
            "dtype": dtype,
            "device": device,
        }
        qkv_bias = bias if qkv_bias is None else qkv_bias
        self.query_key_value = self._new_query_key_value(hidden_size, qkv_bias, ranks, init_std=init_std, **layout)
        self.query_norm = self.key_norm = None
        if query_key_norm_eps is not None:
            # Their own flags for gradients do not serve: every rank has other heads, whatever the sequence.
            self.query_norm, self.key_norm = (
                RMSNorm(head_dim, query_key_norm_eps, tp_group=None, dtype=dtype, device=device) for _ in range(2)
            )
        self.projection = RowParallelLinear(
            num_heads * head_dim, hidden_size, bias, skip_bias_add=skip_bias_add, init_std=output_init_std, **layout
        )

    def _new_query_key_value(self, hidden_size: int, bias: bool, ranks: int, **options: Any) -> ColumnParallelLinear:
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if self.num_kv_heads == self.num_heads:
            return ColumnParallelLinear(hidden_size, 3 * width, bias, **options)
        copies = max(1, ranks // self.num_kv_heads)
        parts = [OutputPart("query", width), *(OutputPart(name, kv_width, copies) for name in ("key", "value"))]
        return StackedColumnParallelLinear(hidden_size, parts, bias, **options)

    def forward(
        self,
        x: torch.Tensor,
        *,
        rotary: Tables | None = None,
        dropout: DropoutMasks | None = None,
        hidden_keys: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """x [S, B, H], or [S / R, B, H] under sequence parallelism, to the same shape; (y, bias) with skip_bias_add.

        Args:
            x: activations.
            rotary: cos and sin [at least S, Drot / 2] that queries and keys are rotated by; None for positions that
                are in x already.
            dropout: masks of attention_dropout, place 0; None drops nothing.
            hidden_keys: [B, S] bool, True for keys that no query sees (padding); at least one a row is False.
        """
        query, key, value = self._query_key_value(x)
        if self.query_norm is not None and self.key_norm is not None:
            weights = (self.query_norm.weight, self.key_norm.weight)
            query_weight, key_weight = identity_all_reduce_together(weights, self.query_key_value.tp_group)
            query = ops.rms_norm(query, query_weight, self.query_norm.eps)
            key = ops.rms_norm(key, key_weight, self.key_norm.eps)
        if rotary is not None:
            query, rotated = ops.rotary_embedding(query, key, *rotary)
            assert rotated is not None
            key = rotated
        if self.recompute and torch.is_grad_enabled():
            # Nothing in there draws from torch's generators, so their state need not be kept.
            context = checkpoint(
                self._attend, query, key, value, dropout, hidden_keys, use_reentrant=False, preserve_rng_state=False
            )
        else:
            context = self._attend(query, key, value, dropout, hidden_keys)
        return self.projection(context)

    def _query_key_value(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views [S, B, heads of this rank, D]."""
        qkv = self.query_key_value(x)
        seq_len, batch = qkv.shape[:2]
        if self.num_kv_heads == self.num_heads:
            return qkv.view(seq_len, batch, -1, 3, self.head_dim).unbind(3)
        heads = qkv.view(seq_len, batch, -1, self.head_dim)
        return heads.split([self.heads_shard, self.kv_heads_shard, self.kv_heads_shard], dim=2)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout: DropoutMasks | None,
        hidden_keys: torch.Tensor | None,
    ) -> torch.Tensor:
        """[S, B, heads of this rank, D] each to [S, B, N D / R]."""
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        grouped = self.kv_heads_shard != self.heads_shard
        padding = None if hidden_keys is None else hidden_keys[:, None, None, :]
        if dropout is None or self.attention_dropout == 0.0:
            seen = self._seen_keys(query.shape[2], padding, query.device)
            context = F.scaled_dot_product_attention(
                query, key, value, attn_mask=seen, is_causal=self.causal and seen is None, enable_gqa=grouped
            )
        else:
            if grouped:
                shared = self.heads_shard // self.kv_heads_shard
                key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
            scores = query @ key.transpose(-1, -2)
            probabilities = ops.scaled_masked_softmax(
                scores, padding, scale=self.head_dim**-0.5, causal=self.causal, window=self.sliding_window
            )
            kept = dropout.drop_heads(0, probabilities, self.attention_dropout, self.first_head, self.num_heads)
            context = kept @ value
        return context.permute(2, 0, 1, 3).flatten(2)

    def _seen_keys(self, seq_len: int, padding: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
        """[S, S] or [B, 1, S or 1, S] bool, True where a query sees a key; None where causal or no mask says it all."""
        windowed = self.sliding_window is not None and self.sliding_window < seq_len
        if not windowed and (padding is None or not self.causal):
            return None if padding is None else ~padding
        seen = torch.ones(seq_len, seq_len, dtype=torch.bool, device=device).tril()
        if windowed:
            seen = seen.triu(1 - (self.sliding_window or 0))
        return seen if padding is None else seen & ~padding
