"""The engine of linear_cross_entropy: a head's loss and gradients, one tile of the logits at a time.

    x [t, H] a chunk of tokens, w [v, H] a block of words
    logits  [t, v] = x @ w.T + b              product 1; the tile, one buffer for all
    stats   [t, 2]                            of the tile; those of all blocks and shards merge to loss and lse
    dlogits [t, v]                            in place of the logits, from the merged lse
    dx      [t, H] = sum over blocks of dlogits @ w           product 2
    dw      [v, H] = sum over chunks of dlogits.T @ x         product 3

Where the upstream gradient is one number for all tokens and a tile has all words of the shard, the gradients are made
while the tile is there: 3 products. Else a second pass makes the tile again: 4 products.

Shards of a vocabulary exchange what they must through an Exchange, which is handed in: nothing here communicates.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any, NamedTuple

import torch

from fused_megatron.ops.cross_entropy_shards import (
    cross_entropy_gradient_,
    cross_entropy_merge,
    cross_entropy_statistics,
)
from fused_megatron.ops.product import product

Pending = Callable[[], torch.Tensor]
"""Something under way; calling it, once, gives the result."""

# Bytes of a tile. On a GPU: enough tokens to fill it with work, little beside the weights. On a CPU: the fewer chunks
# the fewer passes over dw, and the peak at 4096 tokens, 768 -> 50304, stays below 1/8 of that with whole logits.
_TILE_BYTES = {"gpu": 256 << 20, "cpu": 100 << 20}
# Where the product is made in float32 for 16-bit operands, blocks of words are cast as they are used, and the tile is
# small beside the caches; up to so many tokens at once no gradient of a weight needs an accumulator.
_CAST_TILE_BYTES = 8 << 20
_CAST_TOKENS = 8192
_CPU_HAS_MATRIX_UNITS = {
    torch.bfloat16: torch.cpu._is_amx_tile_supported(),
    torch.float16: torch.cpu._is_amx_fp16_supported(),
}
# Rows of a tile and blocks of words begin at multiples of so many elements: what matrix units and wide loads want.
_ALIGNMENT = 64


class Exchange:
    """What the shards of a vocabulary exchange, started before the work that hides it. This one: a single device.

    Attributes:
        num_shards: of the vocabulary.
        num_blocks: of how many ranks' rows a chunk of tokens consists, one block after the other.
    """

    num_shards = 1
    num_blocks = 1

    def start_hidden(self, rows: torch.Tensor) -> Pending:
        """Rows [n, H] of this rank to those of the chunk [num_blocks n, H]."""
        return lambda: rows

    def start_statistics(self, stats: torch.Tensor) -> Pending:
        """[t, 2] of this shard to [R, t, 2] of all."""
        return lambda: stats.unsqueeze(0)

    def start_dhidden(self, partial: torch.Tensor) -> Pending:
        """This shard's part [num_blocks n, H] of the gradient to the sum, of this rank's rows [n, H]."""
        return lambda: partial


class LossTerms(NamedTuple):
    """The loss, as in ops.cross_entropy_statistics."""

    vocab_size: int
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    vocab_start: int = 0


@dataclass
class _Gradients:
    """Sums over the chunks; None where not wanted."""

    dhidden: torch.Tensor | None
    dweight: torch.Tensor | None
    dbias: torch.Tensor | None
    started: bool = False  # the sums of dweight and dbias hold something


def _as_cast(method: Callable[..., Any]) -> Callable[..., Any]:
    """The operands have been cast by now: autocast must not cast sums and products in float32 once more."""

    @wraps(method)
    def without_autocast(self: "TiledHead", *args: Any) -> Any:
        # torch knows no autocast of the meta device.
        with torch.autocast("cpu" if self.hidden.is_meta else self.hidden.device.type, enabled=False):
            return method(self, *args)

    return without_autocast


@dataclass
class TiledHead:
    """A head (of one shard of the vocabulary) and its loss.

    Args:
        hidden: [n, H]; this rank's tokens, in the dtype that the operands of the products are rounded to.
        weight: [V, H]; any float dtype.
        bias: [V] or None.
        target: [num_blocks n] int64; of all tokens, rank by rank. Not checked.
        terms: of the loss; words from terms.vocab_size on are padding, and no product is made for them.
        chunk_tokens: tokens of a tile; None: by the size of a tile.
        exchange: of the shards.
        one_pass: losses_and_gradients is what will be asked for.
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
        self.num_words = max(0, min(self.weight.shape[0], self.terms.vocab_size - self.terms.vocab_start))
        self.product_dtype = product_dtype(self.hidden)
        # The exchange about one tile hides under the product that makes another.
        self.num_tiles = 2 if self.one_pass and self.exchange.num_shards > 1 else 1
        # By the rows of the weight, padding among them: every shard must make the same chunks.
        tokens, self.words_per_block = tile_shape(
            len(self.target), self.weight.shape[0], self.hidden.dtype, self.product_dtype, self.hidden.device.type,
            self.chunk_tokens, self.num_tiles,
        )  # fmt: skip
        self.rows_per_chunk = max(1, tokens // self.exchange.num_blocks)

    # ---- The three passes ------------------------------------------------------------------------------------------

    @_as_cast
    def losses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, lse), each [num_blocks n] float32 (float64); one product."""
        loss, lse = self._per_token(), self._per_token()
        waiting: tuple[slice, Pending] | None = None
        for rows, x in self._chunks():
            stats = self._statistics(x, self._of(self.target, rows))
            # Merged one chunk later: the exchange hides under the product of the next chunk.
            if waiting:
                self._merge(*waiting, loss, lse)
            waiting = rows, self.exchange.start_statistics(stats)
        if waiting:
            self._merge(*waiting, loss, lse)
        return loss.flatten(), lse.flatten()

    @_as_cast
    def gradients(self, grad_loss: torch.Tensor, lse: torch.Tensor, needs: list[bool]) -> list[torch.Tensor | None]:
        """Of hidden, weight and bias, each in its dtype, None where not needed; three products."""
        single = self.hidden.shape[0] <= self.rows_per_chunk
        sums = self._new_sums(needs, self.hidden.dtype, wide_weight=not single)
        for rows, x in self._chunks():
            target, g, z = (self._of(y, rows) for y in (self.target, grad_loss, lse))
            tiles = ((w, self._gradient_(self._logits(x, w), target, g, z, w)) for w in self._blocks())
            self._add_gradients(sums, rows, x, tiles)
        return self._finished(sums)

    @_as_cast
    def losses_and_gradients(
        self, grad_loss: torch.Tensor, needs: list[bool]
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
        """(loss, lse, gradients in float32) for one upstream gradient [] of all tokens; three products in all.

        For tiles that have all words of the shard.
        """
        assert self.has_all_words
        loss, lse = self._per_token(), self._per_token()
        sums = self._new_sums(needs, lse.dtype, wide_weight=True)
        words = slice(0, self.num_words)
        waiting: deque[tuple[slice, torch.Tensor, torch.Tensor, Pending]] = deque()

        def finish(rows: slice, x: torch.Tensor, logits: torch.Tensor, stats: Pending) -> None:
            self._merge(rows, stats, loss, lse)
            target = self._of(self.target, rows)
            dlogits = self._gradient_(logits, target, grad_loss.expand(len(target)), self._of(lse, rows), words)
            self._add_gradients(sums, rows, x, [(words, dlogits)])

        for i, (rows, x) in enumerate(self._chunks()):
            logits = self._logits(x, words, i % self.num_tiles)
            stats = self._tile_statistics(logits, self._of(self.target, rows), words)
            waiting.append((rows, x, logits, self.exchange.start_statistics(stats)))
            if len(waiting) == self.num_tiles:
                finish(*waiting.popleft())
        while waiting:
            finish(*waiting.popleft())
        return loss.flatten(), lse.flatten(), [sums.dhidden, *self._sums_of_parameters(sums)]

    @property
    def has_all_words(self) -> bool:
        """Whether a tile has all words."""
        return self.words_per_block >= self.num_words

    # ---- Tiles -----------------------------------------------------------------------------------------------------

    def _chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """This rank's rows of each chunk, and the chunk's hidden; that of the next one is under way by then."""
        num_rows = self.hidden.shape[0]
        chunks = [slice(a, min(a + self.rows_per_chunk, num_rows)) for a in range(0, num_rows, self.rows_per_chunk)]
        waiting = self.exchange.start_hidden(self.hidden[chunks[0]]) if chunks else None
        for i, rows in enumerate(chunks):
            assert waiting is not None
            x = waiting()
            if i + 1 < len(chunks):
                waiting = self.exchange.start_hidden(self.hidden[chunks[i + 1]])
            yield rows, x.to(self.product_dtype)

    def _blocks(self) -> list[slice]:
        """Blocks of words; one that is empty for a shard of padding alone."""
        step = max(1, self.words_per_block)
        starts = range(0, max(1, self.num_words), step)
        return [slice(a, min(a + step, self.num_words)) for a in starts]

    def _of(self, per_token: torch.Tensor, rows: slice) -> torch.Tensor:
        """The tokens of a chunk, from something about all of them."""
        return per_token.view(self.exchange.num_blocks, -1)[:, rows].reshape(-1)

    def _per_token(self) -> torch.Tensor:
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        return self.hidden.new_empty((self.exchange.num_blocks, self.hidden.shape[0]), dtype=wide)

    @cached_property
    def _buffers(self) -> list[torch.Tensor]:
        words = min(self.words_per_block, self.num_words)
        columns = -(-words // _ALIGNMENT) * _ALIGNMENT
        rows = min(self.rows_per_chunk, self.hidden.shape[0]) * self.exchange.num_blocks
        num_tiles = min(self.num_tiles, -(-self.hidden.shape[0] // self.rows_per_chunk))
        tiles = [self.hidden.new_empty((rows, columns), dtype=self.product_dtype) for _ in range(num_tiles)]
        for tile in tiles:
            # A CPU's matrix units read past the last column of a view and multiply by zero: NaN there would stay NaN.
            tile[:, words:].zero_()
        return tiles

    @cached_property
    def _whole_weight(self) -> torch.Tensor:
        return self._cast(self.weight[: self.num_words])

    def _weight(self, words: slice) -> torch.Tensor:
        # Where there are several blocks each is cast when it is used: the weight never exists twice.
        return self._whole_weight if self.has_all_words else self._cast(self.weight[words])

    def _cast(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.to(self.hidden.dtype).to(self.product_dtype)

    def _logits(self, x: torch.Tensor, words: slice, tile: int = 0) -> torch.Tensor:
        logits = self._buffers[tile][: x.shape[0], : words.stop - words.start]
        bias = None if self.bias is None else self._cast(self.bias[words])
        return product(x, self._weight(words), bias, out=logits)

    # ---- The loss of a tile ----------------------------------------------------------------------------------------

    def _shard(self, words: slice) -> dict[str, Any]:
        """A block of words is to the loss what a shard of the vocabulary is."""
        terms = self.terms
        return {
            "vocab_start": terms.vocab_start + words.start, "vocab_size": terms.vocab_size,
            "ignore_index": terms.ignore_index, "label_smoothing": terms.label_smoothing, "softcap": terms.softcap,
        }  # fmt: skip

    def _tile_statistics(self, logits: torch.Tensor, target: torch.Tensor, words: slice) -> torch.Tensor:
        return cross_entropy_statistics(logits, target, check_target=False, **self._shard(words))

    def _statistics(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(lse, linear) [t, 2] over all words of this shard."""
        blocks = [self._tile_statistics(self._logits(x, words), target, words) for words in self._blocks()]
        if len(blocks) == 1:
            return blocks[0]
        lse, linear = torch.stack(blocks).unbind(2)
        return torch.stack((lse.logsumexp(0), linear.sum(0)), dim=1)

    def _merge(self, rows: slice, stats: Pending, loss: torch.Tensor, lse: torch.Tensor) -> None:
        terms = self.terms
        target = self._of(self.target, rows)
        merged = cross_entropy_merge(stats(), target, ignore_index=terms.ignore_index, z_loss=terms.z_loss)
        for whole, chunk in zip((loss, lse), merged, strict=True):
            whole[:, rows] = chunk.view(self.exchange.num_blocks, -1)

    def _gradient_(
        self, logits: torch.Tensor, target: torch.Tensor, grad_loss: torch.Tensor, lse: torch.Tensor, words: slice
    ) -> torch.Tensor:
        return cross_entropy_gradient_(
            grad_loss, logits, target, lse, z_loss=self.terms.z_loss, **self._shard(words)
        )  # fmt: skip

    # ---- Gradients -------------------------------------------------------------------------------------------------

    def _new_sums(self, needs: list[bool], hidden_dtype: torch.dtype, *, wide_weight: bool) -> _Gradients:
        """Sums over several chunks are float32; a single product is rounded on its way out."""
        needs_dhidden, needs_dweight, needs_dbias = needs
        dhidden = dweight = dbias = None
        if needs_dhidden:
            dhidden = self.hidden.new_empty(self.hidden.shape, dtype=hidden_dtype)
        if needs_dweight:
            dtype = torch.promote_types(self.weight.dtype, torch.float32) if wide_weight else self.weight.dtype
            dweight = self.weight.new_empty(self.weight.shape, dtype=dtype)
        if needs_dbias and self.bias is not None:
            dbias = self.bias.new_empty(self.bias.shape, dtype=torch.promote_types(self.bias.dtype, torch.float32))
        return _Gradients(dhidden, dweight, dbias)

    def _add_gradients(
        self, sums: _Gradients, rows: slice, x: torch.Tensor, tiles: Iterable[tuple[slice, torch.Tensor]]
    ) -> None:
        """Those of a chunk, from its (words, dlogits)."""
        own = None if sums.dhidden is None else sums.dhidden[rows]
        partial = None if own is None else self._new_partial(own, x)
        dx: Pending | None = None
        for words, dlogits in tiles:
            if partial is not None:
                _add_product(partial, dlogits, self._weight(words), first=words.start == 0)
                if words.stop == self.num_words:  # whole: its exchange hides under the product for dw
                    dx = self.exchange.start_dhidden(partial)
            self._add_dw(sums, dlogits, x, words)
        sums.started = True
        if own is not None and dx is not None and (total := dx()) is not own:
            own.copy_(total)

    def _new_partial(self, total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Memory for this shard's part of dhidden of a chunk: the total itself where nothing is exchanged."""
        wide = torch.promote_types(self.product_dtype, torch.float32)
        dtype = self.product_dtype if self.has_all_words else wide
        if self.exchange.num_shards == 1 and total.dtype in (dtype, wide):
            return total
        return x.new_empty(x.shape, dtype=dtype)

    def _add_dw(self, sums: _Gradients, dlogits: torch.Tensor, x: torch.Tensor, words: slice) -> None:
        if sums.dweight is not None:
            _add_product(sums.dweight[words], dlogits.t(), x, first=not sums.started)
        if sums.dbias is not None:
            total = dlogits.sum(0, dtype=sums.dbias.dtype)
            sums.dbias[words].copy_(total) if not sums.started else sums.dbias[words].add_(total)

    def _sums_of_parameters(self, sums: _Gradients) -> list[torch.Tensor | None]:
        for total in (sums.dweight, sums.dbias):
            if total is not None:
                total[self.num_words if sums.started else 0 :].zero_()  # padding; or there were no tokens
        return [sums.dweight, sums.dbias]

    def _finished(self, sums: _Gradients) -> list[torch.Tensor | None]:
        dweight, dbias = self._sums_of_parameters(sums)
        if dweight is not None:
            dweight = dweight.to(self.weight.dtype)
        if dbias is not None and self.bias is not None:
            dbias = dbias.to(self.bias.dtype)
        return [sums.dhidden, dweight, dbias]


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
    """total = a @ b for the first, total += a @ b for the others, summed in the dtype of total."""
    product(a, b.t(), out=total, add=not first)


def product_dtype(operand: torch.Tensor) -> torch.dtype:
    """The dtype that products of 16-bit operands are made in.

    On a GPU, and on a CPU with matrix units for it, that of the operands. Other CPUs multiply float32 at least as fast
    as 16-bit numbers, so the operands are widened tile by tile, and neither logits nor partial sums are rounded.
    """
    dtype = operand.dtype
    native = operand.device.type != "cpu" or dtype.itemsize != 2 or _CPU_HAS_MATRIX_UNITS[dtype]
    return dtype if native else torch.float32


def tile_shape(
    num_tokens: int, num_words: int, dtype: torch.dtype, product: torch.dtype, device: str, chunk_tokens: int | None,
    num_tiles: int = 1,
) -> tuple[int, int]:  # fmt: skip
    """(tokens, words) of one of num_tiles: chunks of tokens by all words or, where operands are cast, both cut."""
    if dtype == product:
        row_bytes = max(1, num_words) * product.itemsize
        most = _TILE_BYTES["cpu" if device == "cpu" else "gpu"] // row_bytes
        most = most if num_tokens <= most else most // num_tiles  # one tile is enough where it holds all
        return chunk_tokens or _even_share(num_tokens, most), max(1, num_words)
    tokens = chunk_tokens or _even_share(num_tokens, _CAST_TOKENS)
    return tokens, _even_share(num_words, _CAST_TILE_BYTES // (max(1, min(tokens, num_tokens)) * product.itemsize))


def fits_one_pass(hidden: torch.Tensor, num_words: int, chunk_tokens: int | None) -> bool:
    """Whether the tiles of a head have all its words, so that losses_and_gradients can be asked."""
    tokens, product = hidden.shape[0], product_dtype(hidden)
    return tile_shape(tokens, num_words, hidden.dtype, product, hidden.device.type, chunk_tokens)[1] >= num_words


def _even_share(total: int, most: int) -> int:
    """A part of about the same size for each, at most `most` (and at least the alignment), in whole alignments."""
    most = max(_ALIGNMENT, most // _ALIGNMENT * _ALIGNMENT)
    num_parts = max(1, -(-total // most))
    return min(most, -(-max(1, total) // num_parts // _ALIGNMENT) * _ALIGNMENT) if num_parts > 1 else max(1, total)
