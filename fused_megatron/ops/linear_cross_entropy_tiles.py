"""Tiled computation of linear_cross_entropy: a head's loss and gradients, one tile of logits at a time.

    x [t, H] a chunk of tokens, w [v, H] a block of vocabulary entries
    logits  [t, v] = x @ w.T + b              product 1; one tile; all tiles use the same buffer
    stats   [t, 3]                            of the tile; merged over blocks and shards to loss and lse
    dlogits [t, v]                            overwrites the logits; needs the merged lse
    dx      [t, H] = sum over blocks of dlogits @ w           product 2
    dw      [v, H] = sum over chunks of dlogits.T @ x         product 3

If all tokens have the same upstream gradient and a tile has all entries of the shard, the gradients are computed while
the tile is in memory: 3 products. Otherwise a second pass recomputes the tiles: 4 products.

Shards of a vocabulary communicate through an Exchange, an argument; this file contains no communication.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any

import torch

from fused_megatron.ops.cross_entropy_shards import (
    Exchange,
    Pending,
    gradient_of_shard_,
    merged_loss,
    statistics_of_shard,
)
from fused_megatron.ops.linear_cross_entropy_tile_shape import padded_width, tiles_of
from fused_megatron.ops.product import product
from fused_megatron.reference.cross_entropy import LossTerms, united_statistics


@dataclass
class _Sums:
    """Gradients of hidden, weight and bias, summed over the chunks; None where not needed."""

    dhidden: torch.Tensor | None
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None
    started: bool = False  # whether a chunk has been added to dweight and dbias

    def add_parameters(self, dlogits: torch.Tensor, x: torch.Tensor, entries: slice) -> None:
        """Add the contribution of one tile to dweight and dbias."""
        if self.dweight is not None:
            _add_product(self.dweight[entries], dlogits.t(), x, first=not self.started)
        if self.dbias is not None:
            total = dlogits.sum(0, dtype=self.dbias.dtype)
            if self.started:
                self.dbias[entries].add_(total)
            else:
                self.dbias[entries].copy_(total)

    def clear_padding(self, num_entries: int) -> None:
        """Set the gradients of padding to zero; without tokens, all gradients."""
        for total in (self.dweight, self.dbias):
            if total is not None:
                total[num_entries if self.started else 0 :].zero_()


def _as_cast(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a method without autocast: the operands are already cast, and float32 products must stay float32."""

    @wraps(method)
    def without_autocast(self: "TiledHead", *args: Any) -> Any:
        # torch has no autocast for the meta device.
        with torch.autocast("cpu" if self.hidden.is_meta else self.hidden.device.type, enabled=False):
            return method(self, *args)

    return without_autocast


@dataclass
class TiledHead:
    """A linear head (one shard of the vocabulary) and its loss.

    Args:
        hidden: [n, H]; this rank's tokens, in the dtype to which the operands of the products are rounded.
        weight: [V, H]; any float dtype.
        bias: [V] or None.
        target: [num_blocks n] int64; of all tokens, rank by rank. Not checked.
        terms: of the loss; entries from terms.vocab_size on are padding and take part in no product.
        chunk_tokens: tokens of a tile; None: chosen by the bytes of a tile.
        exchange: communication between the shards.
        one_pass: whether forward will compute gradients.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    terms: LossTerms
    chunk_tokens: int | None = None
    exchange: Exchange = field(default_factory=Exchange)
    one_pass: bool = False

    def __post_init__(self) -> None:
        num_rows = self.weight.shape[0]
        self.num_entries = self.terms.num_real(num_rows)
        # With two tiles, the communication of one hides under the product of the other.
        self.num_tiles = 2 if self.one_pass and self.exchange.num_shards > 1 else 1
        # Counts padding rows of the weight too: every shard must have the same chunks.
        self.tile = tiles_of(self.hidden, len(self.target), num_rows, self.chunk_tokens, self.num_tiles)
        self.rows_per_chunk = max(1, self.tile.tokens // self.exchange.num_blocks)
        starts = range(0, max(1, self.num_entries), self.tile.entries)
        # Blocks of entries; a shard of only padding has one empty block.
        self.blocks = [slice(a, min(a + self.tile.entries, self.num_entries)) for a in starts]

    @_as_cast
    def forward(
        self, upstream: torch.Tensor | None = None, needs: Sequence[bool] = (False, False, False)
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
        """Compute the loss and, if upstream is given, the gradients.

        Args:
            upstream: [] float32; the gradient of every token's loss. Needs tiles with all entries of the shard.
            needs: which gradients, of (hidden, weight, bias), to compute.

        Returns:
            loss [num_blocks n] and lse [num_blocks n, 2], float32 (float64); gradients of hidden, weight and bias in
            float32, None where not needed. Costs one product per tile, with gradients three.
        """
        assert upstream is None or len(self.blocks) == 1
        loss = self._per_token()
        lse = self._per_token(2)
        sums = self._new_sums(needs, lse.dtype, wide_weight=True)
        waiting: deque[tuple[slice, torch.Tensor, torch.Tensor, Pending]] = deque()
        # A chunk's communication hides under the next chunk's product. Only gradients still need the tile after that.
        depth = 2 if upstream is None else self.num_tiles

        def finish(rows: slice, x: torch.Tensor, logits: torch.Tensor, stats: Pending) -> None:
            target = self._of(self.target, rows)
            merged = merged_loss(stats(), target, self.weight.shape[0], self.terms)
            for whole, chunk in zip((loss, lse), merged, strict=True):
                whole[:, rows] = chunk.view(self.exchange.num_blocks, -1, *chunk.shape[1:])
            if upstream is not None:
                entries = self.blocks[0]
                per_token = upstream.expand(len(target)).contiguous()
                dlogits = self._gradient_(logits, target, per_token, self._of(lse.flatten(0, 1), rows), entries)
                self._add_gradients(sums, rows, x, [(entries, dlogits)])

        for i, (rows, x) in enumerate(self._chunks()):
            logits, stats = self._statistics(x, self._of(self.target, rows), i % self.num_tiles)
            waiting.append((rows, x, logits, self.exchange.start_statistics(stats)))
            if len(waiting) == depth:
                finish(*waiting.popleft())
        while waiting:
            finish(*waiting.popleft())
        sums.clear_padding(self.num_entries)
        return loss.flatten(), lse.flatten(0, 1), [sums.dhidden, sums.dweight, sums.dbias]

    @_as_cast
    def backward(self, grad_loss: torch.Tensor, lse: torch.Tensor, needs: Sequence[bool]) -> list[torch.Tensor | None]:
        """Compute the gradients of hidden, weight and bias, each in its own dtype, None where not needed.

        Costs three products per tile.

        Args:
            grad_loss: [num_blocks n] float32 (float64).
            lse: [num_blocks n, 2] float32 (float64); from forward.
            needs: which gradients, of (hidden, weight, bias), to compute.
        """
        single = self.hidden.shape[0] <= self.rows_per_chunk
        sums = self._new_sums(needs, self.hidden.dtype, wide_weight=not single)
        for rows, x in self._chunks():
            target, g, z = (self._of(y, rows) for y in (self.target, grad_loss, lse))
            tiles = ((w, self._gradient_(self._logits(x, w), target, g, z, w)) for w in self.blocks)
            self._add_gradients(sums, rows, x, tiles)
        sums.clear_padding(self.num_entries)
        parameters = ((sums.dweight, self.weight), (sums.dbias, self.bias))
        rounded = [None if total is None or like is None else total.to(like.dtype) for total, like in parameters]
        return [sums.dhidden, *rounded]

    # ---- Chunks of tokens, and tiles of their logits ---------------------------------------------------------------

    def _chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield this rank's rows of each chunk, and the chunk's hidden; the next chunk is already being gathered."""
        num_rows = self.hidden.shape[0]
        chunks = [slice(a, min(a + self.rows_per_chunk, num_rows)) for a in range(0, num_rows, self.rows_per_chunk)]
        waiting = self.exchange.start_hidden(self.hidden[chunks[0]]) if chunks else None
        for i, rows in enumerate(chunks):
            assert waiting is not None
            x = waiting()
            if i + 1 < len(chunks):
                waiting = self.exchange.start_hidden(self.hidden[chunks[i + 1]])
            yield rows, x.to(self.tile.dtype)

    def _of(self, per_token: torch.Tensor, rows: slice) -> torch.Tensor:
        """Select the tokens of a chunk from a tensor of all tokens."""
        rest = per_token.shape[1:]
        return per_token.view(self.exchange.num_blocks, -1, *rest)[:, rows].reshape(-1, *rest).contiguous()

    def _per_token(self, *numbers: int) -> torch.Tensor:
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        return self.hidden.new_empty((self.exchange.num_blocks, self.hidden.shape[0], *numbers), dtype=wide)

    @cached_property
    def _buffers(self) -> list[torch.Tensor]:
        entries = self.blocks[0].stop
        rows = min(self.rows_per_chunk, self.hidden.shape[0]) * self.exchange.num_blocks
        num_tiles = min(self.num_tiles, -(-self.hidden.shape[0] // self.rows_per_chunk))
        tiles = [self.hidden.new_empty((rows, padded_width(entries)), dtype=self.tile.dtype) for _ in range(num_tiles)]
        for tile in tiles:
            # A CPU's matrix units read past the last column of a view and multiply by 0, which does not remove a NaN.
            tile[:, entries:].zero_()
        return tiles

    @cached_property
    def _whole_weight(self) -> torch.Tensor:
        return self._cast(self.weight[: self.num_entries])

    def _weight(self, entries: slice) -> torch.Tensor:
        # With several blocks, each is cast when it is used: there is no second copy of the full weight.
        return self._whole_weight if len(self.blocks) == 1 else self._cast(self.weight[entries])

    def _cast(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.to(self.hidden.dtype).to(self.tile.dtype)

    def _logits(self, x: torch.Tensor, entries: slice, tile: int = 0) -> torch.Tensor:
        logits = self._buffers[tile][: x.shape[0], : entries.stop - entries.start]
        bias = None if self.bias is None else self._cast(self.bias[entries])
        return product(x, self._weight(entries), bias, out=logits)

    def _statistics(self, x: torch.Tensor, target: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last tile of logits, and the statistics [t, 3] over all entries of this shard."""
        stats = []
        for entries in self.blocks:  # the loss treats a block of entries like a shard of the vocabulary
            logits = self._logits(x, entries, tile)
            stats.append(statistics_of_shard(logits, target, self.terms.from_column(entries.start)))
        if len(stats) == 1:
            return logits, stats[0]
        bounds = [self.terms.vocab_start + column for column in (0, *(entries.stop for entries in self.blocks))]
        return logits, united_statistics(torch.stack(stats), target, bounds, self.terms)

    # ---- Gradients -------------------------------------------------------------------------------------------------

    def _gradient_(
        self, logits: torch.Tensor, target: torch.Tensor, grad_loss: torch.Tensor, lse: torch.Tensor, entries: slice
    ) -> torch.Tensor:
        gradient_of_shard_(grad_loss, logits, target, lse, self.terms.from_column(entries.start))
        return logits

    def _new_sums(self, needs: Sequence[bool], hidden_dtype: torch.dtype, *, wide_weight: bool) -> _Sums:
        """Allocate the gradients: float32 for sums over several chunks, the parameter's dtype for a single product."""
        needs_dhidden, needs_dweight, needs_dbias = needs
        dhidden = dweight = dbias = None
        if needs_dhidden:
            dhidden = self.hidden.new_empty(self.hidden.shape, dtype=hidden_dtype)
        if needs_dweight:
            dtype = torch.promote_types(self.weight.dtype, torch.float32) if wide_weight else self.weight.dtype
            dweight = self.weight.new_empty(self.weight.shape, dtype=dtype)
        if needs_dbias and self.bias is not None:
            dbias = self.bias.new_empty(self.bias.shape, dtype=torch.promote_types(self.bias.dtype, torch.float32))
        return _Sums(dhidden, dweight, dbias)

    def _add_gradients(
        self, sums: _Sums, rows: slice, x: torch.Tensor, tiles: Iterable[tuple[slice, torch.Tensor]]
    ) -> None:
        """Add the gradients of a chunk; tiles are its (entries, dlogits)."""
        own = None if sums.dhidden is None else sums.dhidden[rows]
        partial = None if own is None else self._new_partial(own, x)
        dx: Pending | None = None
        for entries, dlogits in tiles:
            if partial is not None:
                _add_product(partial, dlogits, self._weight(entries), first=entries.start == 0)
                if entries.stop == self.num_entries:  # complete: its communication hides under the product for dw
                    dx = self._start_dhidden(partial)
            sums.add_parameters(dlogits, x, entries)
        sums.started = True
        if own is not None and dx is not None and (total := dx()) is not own:
            own.copy_(total)

    def _new_partial(self, total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return memory for this shard's partial dhidden of a chunk: with one shard, the total itself if possible."""
        wide = torch.promote_types(self.tile.dtype, torch.float32)
        dtype = self.tile.dtype if len(self.blocks) == 1 else wide
        if self.exchange.num_shards == 1 and total.dtype in (dtype, wide):
            return total
        return x.new_empty(x.shape, dtype=dtype)

    def _start_dhidden(self, partial: torch.Tensor) -> Pending:
        if self.exchange.num_shards == 1:
            return lambda: partial
        # 16-bit activations are sent in 16 bits, half the bytes, as in column_parallel_linear.
        return self.exchange.start_dhidden(partial.to(self.hidden.dtype))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
    """Set total = a @ b if first, else total += a @ b, summed in the dtype of total."""
    product(a, b.t(), out=total, add=not first)
