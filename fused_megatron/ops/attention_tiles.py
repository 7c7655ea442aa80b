"""Attention summed over blocks of keys, forward and backward, without autograd.

AttentionSum and AttentionGradients see one block of keys after another: a ring passes them around, and the memory of a
rank holds one or two of them. The order of the calls is the order of the sums, so that results are bitwise repeatable.

Paper: Dao et al. 2022, FlashAttention (arXiv:2205.14135), for the merge by log-sum-exp; Liu et al. 2023, Ring Attention
(arXiv:2310.01889), for the blocks.
"""

from collections.abc import Sequence

import numpy as np
import torch

from fused_megatron.ops.attention_kernels import choose_kernel
from fused_megatron.ops.attention_operands import Backward, Operands, TileDropout, part_rows
from fused_megatron.ops.visible_pairs import PairTile

_MINUS_INFINITY = float("-inf")


class AttentionSum:
    """Weighted sum of the values over all keys that were added.

    Args:
        query: [Sq, B, N, D] float.
        scale: factor of the scores; None: D^-0.5.
        dropout: for the probabilities; None: drop nothing.

    Memory: the context once, in float32 as soon as a row has seen two tiles, and one part of a tile.
    """

    def __init__(self, query: torch.Tensor, scale: float | None = None, dropout: TileDropout | None = None) -> None:
        self._query = query
        self._scale = query.shape[-1] ** -0.5 if scale is None else scale
        self._dropout = dropout
        self._context: torch.Tensor | None = None  # [Sq, B, N, Dv]
        seq_len, batch, heads, _ = query.shape
        self._log_sum_exp = query.new_full((seq_len, batch, heads), _MINUS_INFINITY, dtype=sum_dtype(query.dtype))
        self._seen = np.zeros((batch, seq_len), dtype=bool)

    def add(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        tiles: Sequence[PairTile],
        key_padding_mask: torch.Tensor | None = None,
    ) -> None:
        """Add a block of keys.

        Args:
            key: [Sk, B, G, D]; G divides N.
            value: [Sk, B, G, Dv].
            tiles: the pairs of these queries and keys that see each other.
            key_padding_mask: [B, Sk] bool, True for keys that no query sees; None: no padding.
        """
        if self._context is None:
            self._context = self._query.new_zeros((*self._query.shape[:3], value.shape[-1]))
        operands = Operands(self._query, key, value, key_padding_mask, self._scale, self._dropout)
        kernel, _ = choose_kernel(operands)
        for part, context, log_sum_exp in kernel.forward(operands, tiles):
            self._merge(part, context, log_sum_exp)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the context [Sq, B, N, Dv], dtype of query, and the log-sum-exp [Sq, B, N].

        The log-sum-exp is float32, or float64 for float64. A query that saw no key has 0 and -inf. Call after add().
        """
        assert self._context is not None
        return self._context.to(self._query.dtype), self._log_sum_exp

    def _merge(self, part: PairTile, context: torch.Tensor, log_sum_exp: torch.Tensor) -> None:
        """Add the context [b, N, q, Dv] of a part to the rows of its queries."""
        assert self._context is not None
        seen = self._seen[slice(*part.samples), slice(*part.queries)]
        if seen.any():
            self._context = self._context.to(sum_dtype(self._query.dtype))
        rows = part_rows(self._context, part.samples, part.queries)
        sums = part_rows(self._log_sum_exp, part.samples, part.queries)
        if not seen.any():
            rows.copy_(context)
            sums.copy_(log_sum_exp)
        else:
            # The share of the new keys in the sum; where neither side has seen a key, the difference is NaN.
            share = (log_sum_exp - sums).sigmoid().nan_to_num(0.0).unsqueeze(-1)
            rows.lerp_(context.to(rows.dtype), share.to(rows.dtype))
            torch.logaddexp(sums, log_sum_exp, out=sums)
        seen[:] = True


class AttentionGradients:
    """Gradients of attention, block of keys by block of keys.

    Args:
        grad_context: [Sq, B, N, Dv], gradient of the context over all keys.
        query: [Sq, B, N, D].
        context: [Sq, B, N, Dv] over all keys.
        log_sum_exp: [Sq, B, N] over all keys.
        scale, dropout: as in AttentionSum.

    Memory: the gradient of the query once, in float32 as soon as a row has seen two tiles, and one part of a tile.
    """

    def __init__(
        self,
        grad_context: torch.Tensor,
        query: torch.Tensor,
        context: torch.Tensor,
        log_sum_exp: torch.Tensor,
        scale: float | None = None,
        dropout: TileDropout | None = None,
    ) -> None:
        self._query = query
        self._scale = query.shape[-1] ** -0.5 if scale is None else scale
        self._dropout = dropout
        # A row without a key: exp(score - inf) is 0, and exp(score + inf) would be NaN.
        without_key = log_sum_exp == _MINUS_INFINITY
        self._saved = Backward(grad_context, context, log_sum_exp.masked_fill(without_key, float("inf")))
        self._grad_query = _RowSums(query)

    def add(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        tiles: Sequence[PairTile],
        key_padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a block of keys; return the gradients of key and value, in their dtypes. Arguments as in AttentionSum."""
        grad_key, grad_value = _RowSums(key), _RowSums(value)
        operands = Operands(self._query, key, value, key_padding_mask, self._scale, self._dropout)
        kernel, _ = choose_kernel(operands)
        for part, of_query, of_key, of_value in kernel.backward(operands, self._saved, tiles):
            self._grad_query.add(part.samples, part.queries, of_query)
            grad_key.add(part.samples, part.keys, of_key)
            grad_value.add(part.samples, part.keys, of_value)
        return grad_key.result(), grad_value.result()

    def grad_query(self) -> torch.Tensor:
        """Return the gradient of the query over all keys that were added, [Sq, B, N, D], dtype of query."""
        return self._grad_query.result()


class _RowSums:
    """A tensor of the shape and dtype of `like` that is summed up from parts, in float32 where parts overlap."""

    def __init__(self, like: torch.Tensor) -> None:
        self._dtype = like.dtype
        self._sum = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        self._written = np.zeros((like.shape[1], like.shape[0]), dtype=bool)

    def add(self, samples: tuple[int, int], rows: tuple[int, int], x: torch.Tensor) -> None:
        """Add x [b, heads, rows, dim]."""
        written = self._written[slice(*samples), slice(*rows)]
        if written.any():
            self._sum = self._sum.to(sum_dtype(self._dtype))
            part_rows(self._sum, samples, rows).add_(x)
        else:
            part_rows(self._sum, samples, rows).copy_(x)
        written[:] = True

    def result(self) -> torch.Tensor:
        return self._sum.to(self._dtype)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which contributions of several blocks are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32
