"""Kernels for attention within tiles of visible pairs: torch's flash kernels, or matrix products; and their choice.

The backward of every kernel takes the log-sum-exp over all keys of a query, also over keys outside of the tile. So the
gradients of tiles add up.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from fused_megatron.ops.attention_operands import Backward, Operands
from fused_megatron.ops.flash_on_gpu import FlashOnGpu
from fused_megatron.ops.visible_pairs import PairTile
from fused_megatron.reference.precision import widen

_LOG = logging.getLogger(__name__)

_MOST_SCORES = 1 << 22  # scores that exist at once where they are computed by matrix products: 16 MB in float32
_MOST_KEYS = 2048
_BAND_ROWS = 512


class _PartByPart:
    """A kernel that cuts every tile into parts, and computes one part at a time."""

    name: str

    def forward(
        self, operands: Operands, tiles: Sequence[PairTile]
    ) -> Iterator[tuple[PairTile, torch.Tensor, torch.Tensor]]:
        """Yield parts with their context [b, N, q, Dv] and log-sum-exp [b, N, q], -inf for rows without a key."""
        for tile in tiles:
            for part in self.parts(tile, operands.query.shape[2]):
                yield part, *self.forward_of_part(operands.at(part), part)

    def backward(
        self, operands: Operands, saved: Backward, tiles: Sequence[PairTile]
    ) -> Iterator[tuple[PairTile, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield parts with the gradients of their query, key and value."""
        for tile in tiles:
            for part in self.parts(tile, operands.query.shape[2]):
                yield part, *self.backward_of_part(operands.at(part), saved.at(part), part)

    def parts(self, tile: PairTile, heads: int) -> Iterator[PairTile]:
        """Cut a tile."""
        raise NotImplementedError

    def forward_of_part(self, at: Operands, part: PairTile) -> tuple[torch.Tensor, torch.Tensor]:
        """Return context and log-sum-exp of a part."""
        raise NotImplementedError

    def backward_of_part(
        self, at: Operands, saved: Backward, part: PairTile
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of query, key and value of a part."""
        raise NotImplementedError


class FlashOnCpu(_PartByPart):
    """torch's flash kernel for CPUs."""

    name = "torch's flash kernel for CPUs"

    def parts(self, tile: PairTile, heads: int) -> Iterator[PairTile]:
        """Cut a tile into parts whose pairs all see each other, diagonal blocks, and narrow bands."""
        if tile.lower is None and (tile.upper is None or tile.upper == 0):
            yield tile
        elif tile.lower is None:
            assert tile.upper is not None
            last_query, last_key = tile.num_queries - 1, tile.num_keys - 1
            yield tile.part(0, last_query, 0, tile.upper - 1)
            yield tile.part(0, last_query, tile.upper, last_key)
        else:
            # A block of rows computes the whole width of its band, so that low blocks waste less of a narrow band.
            narrow = min(_band_width(tile), tile.num_queries)
            yield from _row_blocks(tile, min(_BAND_ROWS, max(64, narrow // 8)))

    def forward_of_part(self, at: Operands, part: PairTile) -> tuple[torch.Tensor, torch.Tensor]:
        is_diagonal, bias = self._mask(at, part)
        context, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            at.query, at.key, at.value, 0.0, is_diagonal, attn_mask=bias, scale=at.scale
        )
        if at.padding is not None:  # the kernel returns 0 for a row without a key
            sees = _rows_that_see(part, at.padding)[:, None]
            log_sum_exp = log_sum_exp.masked_fill(~sees, float("-inf"))
        return context, log_sum_exp

    def backward_of_part(
        self, at: Operands, saved: Backward, part: PairTile
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        is_diagonal, bias = self._mask(at, part)
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                saved.grad,
                at.query,
                at.key,
                at.value,
                saved.context,
                saved.log_sum_exp,
                0.0,
                is_diagonal,
                attn_mask=bias,
                scale=at.scale,
            )
        )
        return gradients

    def _mask(self, at: Operands, tile: PairTile) -> tuple[bool, torch.Tensor | None]:
        """Return whether the kernel's own causal mask is right, and what to add to the scores, [b or 1, 1, q, k]."""
        is_diagonal = tile.lower is None and tile.upper == 0
        bias = None
        if not is_diagonal and (tile.upper is not None or tile.lower is not None):
            bias = _zero_or_minus_infinity(~_band(tile, at.query.device), at.query.dtype)[None, None]
        if at.padding is not None:
            padded = _zero_or_minus_infinity(at.padding, at.query.dtype)[:, None, None]
            bias = padded.expand(-1, -1, tile.num_queries, -1) if bias is None else bias + padded
        return is_diagonal, bias


class MatrixProducts(_PartByPart):
    """Matrix products and a softmax, in float32 or float64: for dropout, and for what no flash kernel takes."""

    name = "matrix products, a part of the scores at a time"

    def parts(self, tile: PairTile, heads: int) -> Iterator[PairTile]:
        """Cut a tile into parts with a bounded number of scores."""
        keys = min(tile.num_keys, _MOST_KEYS)
        rows = max(1, _MOST_SCORES // (tile.num_samples * heads * keys))
        for block in _row_blocks(tile, rows):
            for first in range(0, block.num_keys, keys):
                last = min(first + keys, block.num_keys) - 1
                lowest = 0 if block.upper is None else max(0, first - block.upper)
                highest = (
                    block.num_queries - 1 if block.lower is None else min(block.num_queries - 1, last - block.lower)
                )
                if lowest <= highest:
                    yield block.part(lowest, highest, first, last)

    def forward_of_part(self, at: Operands, part: PairTile) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self._scores(at, part)
        log_sum_exp = scores.logsumexp(-1)
        probabilities = _probabilities(scores, log_sum_exp)
        kept = probabilities if at.dropout is None else at.dropout(probabilities, part)
        return kept @ _for_each_head(at.value, at.query), log_sum_exp

    def backward_of_part(
        self, at: Operands, saved: Backward, part: PairTile
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        probabilities = _probabilities(self._scores(at, part), saved.log_sum_exp)
        grad, query = saved.grad.to(probabilities.dtype), at.query.to(probabilities.dtype)
        kept = probabilities if at.dropout is None else at.dropout(probabilities, part)
        grad_value = kept.transpose(-1, -2) @ grad
        grad_kept = grad @ _for_each_head(at.value, at.query).transpose(-1, -2)
        grad_probabilities = grad_kept if at.dropout is None else at.dropout(grad_kept, part)
        shift = (grad * saved.context).sum(-1, keepdim=True)
        grad_scores = probabilities * (grad_probabilities - shift) * at.scale
        grad_key = grad_scores.transpose(-1, -2) @ query
        shared = (at.key.shape[1], -1)
        return (
            grad_scores @ _for_each_head(at.key, at.query),
            grad_key.unflatten(1, shared).sum(2),
            grad_value.unflatten(1, shared).sum(2),
        )

    def _scores(self, at: Operands, part: PairTile) -> torch.Tensor:
        """Compute the scores [b, N, q, k], -inf at hidden pairs."""
        key = _for_each_head(at.key, at.query)
        scores = at.query.to(key.dtype) @ key.transpose(-1, -2) * at.scale
        if part.upper is not None or part.lower is not None:
            scores = scores.masked_fill_(~_band(part, scores.device), float("-inf"))
        if at.padding is not None:
            scores = scores.masked_fill_(at.padding[:, None, None], float("-inf"))
        return scores


Kernel = FlashOnCpu | FlashOnGpu | MatrixProducts


def choose_kernel(operands: Operands) -> tuple[Kernel, str]:
    """Return the kernel for the operands, and the reason."""
    query, head_dims = operands.query, (operands.query.shape[-1], operands.value.shape[-1])
    padding, dropout = operands.padding is not None, operands.dropout is not None
    return kernel_for(query.device.type, query.dtype, *head_dims, padding, dropout)


@lru_cache(maxsize=256)
def kernel_for(
    device: str, dtype: torch.dtype, head_dim: int, value_dim: int, padding: bool = False, dropout: bool = False
) -> tuple[Kernel, str]:
    """Return the kernel for operands on a type of device ("cpu", "cuda"), and the reason; the first call logs both."""
    kernel, reason = _choice(device, dtype, head_dim, value_dim, padding=padding, dropout=dropout)
    _LOG.info("attention, %s on %s, head dim %d: %s (%s)", dtype, device, head_dim, kernel.name, reason)
    return kernel, reason


def _choice(
    device: str, dtype: torch.dtype, head_dim: int, value_dim: int, *, padding: bool, dropout: bool
) -> tuple[Kernel, str]:
    if dropout:
        return MatrixProducts(), "dropout that no layout changes needs the probabilities"
    if head_dim != value_dim:
        return MatrixProducts(), f"keys have head dim {head_dim} and values {value_dim}; flash kernels need the same"
    if device == "cpu":
        return FlashOnCpu(), "keys and values have the same head dim"
    if padding:
        return MatrixProducts(), "the flash kernel takes no padding mask; documents can say the same"
    if dtype not in (torch.float16, torch.bfloat16):
        return MatrixProducts(), "the flash kernel takes float16 and bfloat16 only"
    if head_dim > 256:
        return MatrixProducts(), f"the flash kernel takes a head dim of at most 256, not {head_dim}"
    return FlashOnGpu(), "half precision, and a head dim of at most 256"


def _band_width(tile: PairTile) -> int:
    """Number of keys that a query of the tile sees at most."""
    upper = tile.num_keys - 1 if tile.upper is None else tile.upper
    return upper - (tile.lower or 0) + 1


def _row_blocks(tile: PairTile, rows: int) -> Iterator[PairTile]:
    """Cut the queries of a tile into blocks; each part has only keys that its queries see."""
    for first in range(0, tile.num_queries, rows):
        last = min(first + rows, tile.num_queries) - 1
        first_key = 0 if tile.lower is None else max(0, first + tile.lower)
        last_key = tile.num_keys - 1 if tile.upper is None else min(tile.num_keys - 1, last + tile.upper)
        yield tile.part(first, last, first_key, last_key)


def _band(tile: PairTile, device: torch.device) -> torch.Tensor:
    """Return [q, k] bool, True where a query of the tile sees a key."""
    distance = torch.arange(tile.num_keys, device=device) - torch.arange(tile.num_queries, device=device)[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if tile.upper is not None:
        seen &= distance <= tile.upper
    if tile.lower is not None:
        seen &= distance >= tile.lower
    return seen


def _rows_that_see(tile: PairTile, padding: torch.Tensor) -> torch.Tensor:
    """Return [b, q] bool, True for queries that see a key of the tile that is no padding."""
    rows = torch.arange(tile.num_queries, device=padding.device)
    real = torch.nn.functional.pad((~padding).cumsum(1), (1, 0))  # [b, k + 1]: real keys before each key
    last = rows * 0 + tile.num_keys - 1 if tile.upper is None else (rows + tile.upper).clamp(max=tile.num_keys - 1)
    first = rows * 0 if tile.lower is None else (rows + tile.lower).clamp(min=0)
    return real[:, last + 1] > real[:, first]


def _zero_or_minus_infinity(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _for_each_head(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Return keys or values once for each query head, in float32 or float64."""
    x = widen(x)
    return x if x.shape[1] == query.shape[1] else x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def _probabilities(scores: torch.Tensor, log_sum_exp: torch.Tensor) -> torch.Tensor:
    """Compute exp(scores - log_sum_exp), in place of the scores; 0 in rows without a key."""
    without = log_sum_exp == float("-inf")
    return scores.sub_(log_sum_exp.masked_fill(without, float("inf")).unsqueeze(-1)).exp_()
