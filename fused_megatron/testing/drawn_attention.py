"""Random attention problems over blocks of keys, with a dense float64 reference."""

import itertools
import random

import torch

from fused_megatron.ops.attention_tiles import AttentionGradients, AttentionSum
from fused_megatron.ops.visible_pairs import PairTile, Visibility

_HEADS = 4
_SCALE = 0.3


class DrawnAttention:
    """An attention whose keys come in two blocks, with queries and keys in any order of their positions.

    Args:
        seed: decides sizes, documents, window, padding, dropout and values.
        most_positions: largest S.
    """

    def __init__(self, seed: int, most_positions: int = 70) -> None:
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.seq_len, batch = draw.randint(1, most_positions), draw.randint(1, 3)
        causal = draw.random() < 0.7
        window = draw.randint(1, 75) if causal and draw.random() < 0.5 else None
        starts = tuple(
            tuple(sorted({0, *draw.sample(range(self.seq_len), draw.randint(0, min(self.seq_len, 4)))}))
            for _ in range(batch)
        )
        self.visibility = Visibility(causal, window, starts, self.seq_len)
        cuts = sorted({0, self.seq_len, *draw.sample(range(self.seq_len + 1), min(self.seq_len + 1, 5))})
        ranges = list(itertools.pairwise(cuts))
        draw.shuffle(ranges)
        self.blocks = [ranges[: len(ranges) // 2], ranges[len(ranges) // 2 :]]
        self.queries = draw.sample(ranges, len(ranges))
        kv_heads, value_dim = draw.choice([1, 2, 4]), draw.choice([8, 8, 6])
        heads = [(_HEADS, 8), (kv_heads, 8), (kv_heads, value_dim), (_HEADS, value_dim)]
        self.tensors = [torch.randn(self.seq_len, batch, *each, dtype=torch.float64) for each in heads]
        self.padding = torch.rand(batch, self.seq_len) < 0.4 if draw.random() < 0.3 else None
        kept = (torch.rand(batch, _HEADS, self.seq_len, self.seq_len) < 0.7) / 0.7
        self.kept = kept.double() if draw.random() < 0.3 else None

    def dropout(self, probabilities: torch.Tensor, tile: PairTile) -> torch.Tensor:
        """Drop the drawn probabilities of a tile."""
        assert self.kept is not None
        queries = slice(tile.query_position, tile.query_position + tile.num_queries)
        keys = slice(tile.key_position, tile.key_position + tile.num_keys)
        return probabilities * self.kept[slice(*tile.samples), :, queries, keys].to(probabilities.dtype)

    def seen(self) -> torch.Tensor:
        """Return [B, S, S] bool, True where a query sees a key."""
        position = torch.arange(self.seq_len)
        distance = position[:, None] - position
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.visibility.causal:
            seen = (distance >= 0) & (distance < (self.visibility.window or self.seq_len))
        documents = [torch.searchsorted(torch.tensor(own), position, right=True) for own in self.visibility.starts]
        seen = torch.stack([seen & (own[:, None] == own) for own in documents])
        return seen if self.padding is None else seen & ~self.padding[:, None]

    def expected(self) -> list[torch.Tensor]:
        """Compute context and gradients of query, key and value with dense matrices in float64."""
        *tensors, grad = self.tensors
        query, key, value = (t.clone().requires_grad_() for t in tensors)
        shared = _HEADS // key.shape[2]
        scores = torch.einsum("ibnd,jbnd->bnij", query, key.repeat_interleave(shared, 2)) * _SCALE
        seen = self.seen()[:, None]
        probabilities = scores.masked_fill(~seen, -1e30).softmax(-1) * seen
        probabilities = probabilities if self.kept is None else probabilities * self.kept
        context = torch.einsum("bnij,jbnd->ibnd", probabilities, value.repeat_interleave(shared, 2))
        return [context.detach(), *torch.autograd.grad(context, (query, key, value), grad)]

    def found(self, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Compute the same block by block, and the log-sum-exp; all in the order of the positions."""
        query, key, value, grad = (t.to(dtype) for t in self.tensors)
        rows = _positions(self.queries)
        dropout = None if self.kept is None else self.dropout
        total = AttentionSum(query[rows], _SCALE, dropout)
        blocks = []
        for ranges in self.blocks:
            at = _positions(ranges)
            padding = None if self.padding is None else self.padding[:, at]
            blocks.append((at, (key[at], value[at], self.visibility.tiles(self.queries, ranges), padding)))
            total.add(*blocks[-1][1])
        context, log_sum_exp = total.result()
        gradients = AttentionGradients(grad[rows], query[rows], context, log_sum_exp, _SCALE, dropout)
        of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
        for at, block in blocks:
            of_key[at], of_value[at] = gradients.add(*block)
        in_order = torch.tensor(rows).argsort()
        return [context[in_order], gradients.grad_query()[in_order], of_key, of_value], log_sum_exp[in_order]


def _positions(ranges: list[tuple[int, int]]) -> list[int]:
    return [position for start, stop in ranges for position in range(start, stop)]
