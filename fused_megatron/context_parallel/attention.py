"""Attention of a sequence that several ranks share, each with the queries, keys and values of its own positions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from fused_megatron.checks import InputError, check, check_dtype, check_shape, found_on_every_rank
from fused_megatron.collectives.exchanges import connect_for_messages
from fused_megatron.collectives.groups import group_rank, group_size, on_ranks
from fused_megatron.collectives.transfers import start_all_gather
from fused_megatron.context_parallel.attention_plan import AttentionPlan, Ranges, plan_of
from fused_megatron.context_parallel.gathered_keys import gather_keys, scatter_gradients
from fused_megatron.context_parallel.head_exchange import HeadExchange
from fused_megatron.context_parallel.methods import exchange_size
from fused_megatron.context_parallel.ring import RingKeys, ring_backward, ring_forward
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.ops.attention_tiles import AttentionGradients, AttentionSum
from fused_megatron.ops.autograd_function import AutogradFunction
from fused_megatron.ops.visible_pairs import PairTile
from fused_megatron.sharding import SequencePartition

HeadDropout = Callable[[torch.Tensor, PairTile, int], torch.Tensor]
"""Maps (probabilities [b, heads, q, k], their tile, index of their first head among those of the query argument) to the
kept and rescaled probabilities. It draws the same mask at each call, by the positions of the tile."""


def context_parallel_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: AttentionMask,
    *,
    partition: SequencePartition,
    method: str = "ring",
    group: dist.ProcessGroup | None,
    scale: float | None = None,
    dropout: HeadDropout | None = None,
) -> torch.Tensor:
    """Compute ops.attention.attend of a sequence whose positions are divided over the ranks of a group.

    forward     context_shard_s [own rows, B, N, Dv] = softmax(scale query_shard_s key^T) value, for each head
    backward    the gradients of query_shard_s, key_shard_s and value_shard_s; each sums over the queries of all ranks

    Every method takes every partition; partition_for() returns the one that balances its work. n is the number of
    ranks, m the rows of a rank, d = exchange_size() the ranks that exchange heads.

    Args:
        query: [own rows, B, N, D] float, any strides.
        key: [own rows, B, G, D], dtype of query; G divides N.
        value: [own rows, B, G, Dv], dtype of query.
        mask: what each query sees. key_padding_mask: [B, own rows]. documents: of all B S tokens, on the CPU; they must
            not change between forward and backward.
        partition: the positions of each rank, the same on all of them.
        method: "ring", "all_gather", "all_to_all" or "all_to_all+ring".
        group: the ranks; None for this rank only.
        scale: factor of the scores; None: D^-0.5.
        dropout: for the probabilities, see HeadDropout; None: no dropout.

    Returns:
        [own rows, B, N, Dv], dtype of query. A query that sees no key has 0.

    Raises:
        InputError: an unknown method, "all_to_all" with heads that n does not divide, a partition for other sizes,
            shapes that do not fit, bad documents. Raised on every rank before any communication.
        TypeError: other dtypes than the query's, a key_padding_mask that is not bool.

    Communication (elements that a rank sends):
        ring            forward: for each other rank a message with the m' <= m rows that its queries see in any sample,
                        keys and values, m' B G (D + Dv). Backward: the messages again, and one of each size back.
        all_gather      forward: one all-gather of n m B G (D + Dv). Backward: it again, and one reduce-scatter.
        all_to_all      forward: two all-to-alls, of m B (N D + G' (D + Dv)) and of m B N Dv. G' is G, or with fewer
                        key-value heads than ranks the number that all ranks get together. Backward: two of these sizes,
                        and with G' > G the keys and values again.
        all_to_all+ring the all-to-alls among d ranks, and the messages of a ring of n / d members with the rows of d
                        ranks and their G' / d heads.
        With a key_padding_mask also one all-gather of a byte a token.

    Memory: query, key, value and context of own rows are kept for backward, B N m float32 numbers, and a
        key_padding_mask of all rows. While it works: ring, two messages; all_gather, the keys and values of all ranks,
        and once more while they are gathered; all_to_all, a second copy of query, key, value and context. No tensor has
        S x S elements.

    Numerics: hops are merged in a fixed order in float32, so that results are bitwise repeatable. Gradients travel in
        the dtype of the keys and are summed in float32.

    torch.compile breaks its graph here: the host plans the work, and the order of messages and products must stay.

    Papers: see ring.py and head_exchange.py.
    """
    attend = _attend_between_graphs if torch.compiler.is_compiling() else _attend
    return attend(query, key, value, mask, partition, method, group, scale, dropout)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: AttentionMask,
    partition: SequencePartition,
    method: str,
    group: dist.ProcessGroup | None,
    scale: float | None,
    dropout: HeadDropout | None,
) -> torch.Tensor:
    with found_on_every_rank():
        neighbours = _checked_exchange_size(query, key, value, mask, partition, method, group)
        plan = plan_of(partition, mask, query.shape[1], group_rank(group), neighbours, gathered=method == "all_gather")
    connect_for_messages(group, query.device)
    call = _Call(plan, group, query.shape[2], key.shape[2], scale, dropout)
    padding = None if mask.key_padding_mask is None else _gathered_padding(mask.key_padding_mask, plan, group)
    context: torch.Tensor = on_ranks(_ContextParallelAttention, group)(query, key, value, padding, call)
    return context


@torch._disable_dynamo  # torch.compiler.disable, without the seconds that importing torch._dynamo takes
def _attend_between_graphs(*args: Any) -> torch.Tensor:
    return _attend(*args)


def _checked_exchange_size(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: AttentionMask,
    partition: SequencePartition,
    method: str,
    group: dist.ProcessGroup | None,
) -> int:
    """Check the arguments of context_parallel_attention, and return the number of ranks that exchange heads."""
    ranks = group_size(group)
    check(query.dim() == 4 and key.dim() == 4, "query and key must be (own rows, B, N, D) and (own rows, B, G, D)")
    _, batch, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise InputError(f"query has {heads} heads, which must be a multiple of the {kv_heads} heads of key")
    neighbours = exchange_size(method, ranks, heads, kv_heads)
    check(
        partition.num_ranks == ranks,
        f"partition.num_ranks={partition.num_ranks} must be the size of the context-parallel group, {ranks}",
    )
    rows = partition.sizes[group_rank(group)]
    check(min(partition.sizes) >= 1, f"partition.sizes={partition.sizes} leave a rank without tokens (use fewer ranks)")
    check_shape("query", query, (rows, batch, heads, head_dim))
    check_shape("key", key, (rows, batch, kv_heads, head_dim))
    check_shape("value", value, (rows, batch, kv_heads, value.shape[-1]))
    for name, tensor in (("key", key), ("value", value)):
        check_dtype(name, tensor, (query.dtype,))
    if mask.key_padding_mask is not None:
        check_dtype("key_padding_mask", mask.key_padding_mask, (torch.bool,))
        check_shape("key_padding_mask", mask.key_padding_mask, (batch, rows))
    if mask.documents is not None:
        check_dtype("documents", mask.documents, (torch.int32, torch.int64))
        check(
            mask.documents.is_cpu and mask.documents.dim() == 1,
            f"documents on {mask.documents.device} with {mask.documents.dim()} dims must be a vector on the CPU: "
            "the host plans the work",
        )
    return neighbours


def _gathered_padding(padding: torch.Tensor, plan: AttentionPlan, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the key_padding_mask of all ranks, [ranks, rows of the largest, B] uint8; rows that no rank has are 1."""
    most, own = max(plan.sizes), padding.shape[1]
    rows = padding.new_ones(most, padding.shape[0], dtype=torch.uint8)
    rows[:own] = padding.T
    return start_all_gather(rows, 0, group).wait().view(len(plan.sizes), most, -1)


@dataclass(frozen=True)
class _Call:
    """Arguments of one call that are no tensors with gradients.

    Attributes:
        plan, group: what this rank does, and the ranks.
        num_heads, num_kv_heads: N and G.
        scale, dropout: as in context_parallel_attention.
    """

    plan: AttentionPlan
    group: dist.ProcessGroup | None
    num_heads: int
    num_kv_heads: int
    scale: float | None
    dropout: HeadDropout | None

    @property
    def gathers(self) -> bool:
        """Whether keys are gathered; otherwise they go around the ring of the plan's hops."""
        return not self.plan.hops

    @property
    def heads(self) -> HeadExchange:
        """The exchange of heads for rows; among this rank only if the method has none."""
        members = self.plan.neighbours
        sizes = tuple(self.plan.sizes[member] for member in members)
        me = members.index(self.plan.rank)
        return HeadExchange(members, me, sizes, self.num_heads, self.num_kv_heads, self.group)

    @property
    def tile_dropout(self) -> Callable[[torch.Tensor, PairTile], torch.Tensor] | None:
        """Dropout of the heads that this rank attends with."""
        if self.dropout is None:
            return None
        heads = self.heads
        return _FirstHead(self.dropout, heads.query_heads(heads.me)[0])

    def ring_keys(self, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor | None) -> RingKeys:
        """Return the keys and values of this member of the ring."""
        of_rows = None if padding is None else partial(self._padding_of_rows, padding)
        return RingKeys(key, value, self.plan.hops, self.group, of_rows)

    def _padding_of_rows(self, padding: torch.Tensor, rank: int, ranges: Ranges) -> torch.Tensor:
        """Return the key_padding_mask [B, rows] of ranges of the rows that a rank has after the exchange of heads."""
        neighbours = len(self.plan.neighbours)
        first = rank // neighbours * neighbours
        rows = torch.cat([padding[each, : self.plan.sizes[each]] for each in range(first, first + neighbours)])
        return torch.cat([rows[start:stop] for start, stop in ranges] or [rows[:0]]).T.bool()

    def padding_of_positions(self, padding: torch.Tensor | None) -> torch.Tensor | None:
        """Return the key_padding_mask [B, S] in the order of the positions."""
        if padding is None:
            return None
        return torch.cat([padding[rank, start:stop] for rank, start, stop in self.plan.order]).T.bool()


class _FirstHead:
    """Dropout of the heads from one on."""

    def __init__(self, dropout: HeadDropout, first: int) -> None:
        self._dropout, self._first = dropout, first

    def __call__(self, probabilities: torch.Tensor, tile: PairTile) -> torch.Tensor:
        return self._dropout(probabilities, tile, self._first)


_KEYS, _QUERY = True, False


class _ContextParallelAttention(AutogradFunction):
    op = "context_parallel.context_parallel_attention"

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        padding: torch.Tensor | None,
        call: _Call,
    ) -> torch.Tensor:
        heads, own = call.heads, (key, value)
        if call.gathers:
            attention = AttentionSum(query, call.scale, call.tile_dropout)
            keys, values = gather_keys(key, value, call.plan, call.group)
            attention.add(keys, values, call.plan.tiles, call.padding_of_positions(padding))
            del keys, values
        else:
            query, key, value = heads.to_heads((query, key, value), (_QUERY, _KEYS, _KEYS))
            attention = AttentionSum(query, call.scale, call.tile_dropout)
            ring_forward(attention, call.ring_keys(key, value, padding), heads.spread_keys)
        context, log_sum_exp = attention.result()
        # Copies of key-value heads are not kept: backward exchanges the keys again.
        kept = own if heads.repeats_keys else (key, value)
        ctx.save_for_backward(query, *kept, context, log_sum_exp, padding)
        ctx.call = call
        return heads.to_rows((context,), (_QUERY,))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_context: torch.Tensor) -> Any:
        query, key, value, context, log_sum_exp, padding = ctx.saved_tensors
        call: _Call = ctx.call
        heads = call.heads
        if not call.gathers:
            if heads.repeats_keys:
                grad_context, key, value = heads.to_heads((grad_context, key, value), (_QUERY, _KEYS, _KEYS))
            else:
                (grad_context,) = heads.to_heads((grad_context,), (_QUERY,))
        gradients = AttentionGradients(grad_context, query, context, log_sum_exp, call.scale, call.tile_dropout)
        if call.gathers:
            keys, values = gather_keys(key, value, call.plan, call.group)
            found = gradients.add(keys, values, call.plan.tiles, call.padding_of_positions(padding))
            grad_key, grad_value = scatter_gradients(*found, call.plan, call.group)
            return gradients.grad_query(), grad_key, grad_value, None, None
        ring = call.ring_keys(key, value, padding)
        found = ring_backward(gradients, ring, call.plan.own_halves, heads.spread_keys, heads.joined_keys)
        return *heads.to_rows((gradients.grad_query(), *found), (_QUERY, _KEYS, _KEYS)), None, None
