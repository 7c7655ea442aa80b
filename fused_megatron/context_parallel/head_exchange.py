"""Exchange of heads for rows between neighbouring ranks: all rows of some heads in place of some rows of all heads.

Paper: Jacobs et al. 2023, DeepSpeed-Ulysses (arXiv:2309.14509).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
import torch.distributed as dist

from fused_megatron.collectives.exchanges import exchange_blocks
from fused_megatron.ops.attention_tiles import sum_dtype

Heads = tuple[int, int]
"""First head, and last head + 1."""


@dataclass(frozen=True)
class HeadExchange:
    """Exchange of heads for rows among some ranks.

    Rank i of them attends with the N / d query heads from i N / d on, of d ranks, over the rows of all of them; it gets
    the key-value heads that these query heads use. With fewer key-value heads than ranks several ranks get the same.

    Attributes:
        members: the ranks of the group that exchange, in the order of their rows.
        me: index of this rank among them.
        rows: number of rows of each of them.
        num_heads, num_kv_heads: N and G of each rank before the exchange.
        group: process group of the ranks, which may have others too; None for one rank.
    """

    members: tuple[int, ...]
    me: int
    rows: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    group: dist.ProcessGroup | None

    def query_heads(self, member: int) -> Heads:
        """Return the query heads of a member."""
        each = self.num_heads // len(self.members)
        return member * each, (member + 1) * each

    def kv_heads(self, member: int) -> Heads:
        """Return the key-value heads that the query heads of a member use."""
        first, end = self.query_heads(member)
        shared = self.num_heads // self.num_kv_heads
        return first // shared, (end - 1) // shared + 1

    @property
    def repeats_keys(self) -> bool:
        """Whether several members get the same key-value head."""
        heads = (self.kv_heads(member) for member in range(len(self.members)))
        return sum(end - first for first, end in heads) > self.num_kv_heads

    def to_heads(self, tensors: Sequence[torch.Tensor], are_keys: Sequence[bool]) -> list[torch.Tensor]:
        """Exchange rows for heads.

        Args:
            tensors: [own rows, B, N or G, ..] each, of one dtype.
            are_keys: for each tensor whether its heads are key-value heads.

        Returns:
            For each tensor [rows of all members, B, heads of this rank, ..].

        Communication: one all-to-all of the heads of all members.
        """
        if len(self.members) == 1:
            return list(tensors)
        outgoing = [
            [x[:, :, slice(*heads)] for x, heads in zip(tensors, self._heads(member, are_keys), strict=True)]
            for member in range(len(self.members))
        ]
        own = [end - first for first, end in self._heads(self.me, are_keys)]
        shapes = [
            [(rows, x.shape[1], heads, *x.shape[3:]) for x, heads in zip(tensors, own, strict=True)]
            for rows in self.rows
        ]
        received = exchange_blocks(outgoing, shapes, self.members, self.group)
        return [torch.cat(parts) for parts in zip(*received, strict=True)]

    def to_rows(self, tensors: Sequence[torch.Tensor], are_keys: Sequence[bool]) -> list[torch.Tensor]:
        """Exchange heads for rows: the transpose of to_heads. Gradients of a head that several members had are summed.

        Args:
            tensors: [rows of all members, B, heads of this rank, ..] each, of one dtype.
            are_keys: as in to_heads.

        Returns:
            For each tensor [own rows, B, N or G, ..].

        Communication: one all-to-all of the heads of this rank.
        Numerics: sums are in float32 (float64 for float64), in the order of the members, and rounded once.
        """
        if len(self.members) == 1:
            return list(tensors)
        parts = [x.split(self.rows) for x in tensors]
        outgoing = [[part[member] for part in parts] for member in range(len(self.members))]
        shapes = [
            [
                (self.rows[self.me], x.shape[1], end - first, *x.shape[3:])
                for x, (first, end) in zip(tensors, self._heads(member, are_keys), strict=True)
            ]
            for member in range(len(self.members))
        ]
        received = exchange_blocks(outgoing, shapes, self.members, self.group)
        return [
            self._summed_keys(of_members) if is_key and self.repeats_keys else torch.cat(of_members, dim=2)
            for of_members, is_key in zip(zip(*received, strict=True), are_keys, strict=True)
        ]

    def spread_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Return keys or values with a number of heads that divides the query heads, [rows, B, heads, ..].

        They are x itself if each key-value head serves the same number of this rank's query heads in their order.
        Otherwise each query head gets a copy of its own.
        """
        if len(set(self._uses)) == 1:
            return x
        return torch.cat([x[:, :, [head]].expand(-1, -1, uses, -1) for head, uses in enumerate(self._uses)], dim=2)

    def joined_keys(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x for a gradient of spread_keys(x)."""
        if len(set(self._uses)) == 1:
            return gradient
        sums = [part.sum(2, dtype=sum_dtype(part.dtype)) for part in gradient.split(self._uses, dim=2)]
        return torch.stack(sums, dim=2).to(gradient.dtype)

    def _heads(self, member: int, are_keys: Sequence[bool]) -> list[Heads]:
        return [self.kv_heads(member) if is_key else self.query_heads(member) for is_key in are_keys]

    @cached_property
    def _uses(self) -> list[int]:
        """For each key-value head of this rank the number of its query heads that use it."""
        first, end = self.query_heads(self.me)
        shared = self.num_heads // self.num_kv_heads
        kv_first, kv_end = self.kv_heads(self.me)
        bounds = [first, *(head * shared for head in range(kv_first + 1, kv_end)), end]
        return [stop - start for start, stop in pairwise(bounds)]

    def _summed_keys(self, of_members: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sum the gradients [own rows, B, heads of a member, ..] of all members, to [own rows, B, G, ..]."""
        like = of_members[0]
        shape = (*like.shape[:2], self.num_kv_heads, *like.shape[3:])
        total = torch.zeros(shape, dtype=sum_dtype(like.dtype), device=like.device)
        for member, part in enumerate(of_members):
            total[:, :, slice(*self.kv_heads(member))] += part
        return total.to(like.dtype)
