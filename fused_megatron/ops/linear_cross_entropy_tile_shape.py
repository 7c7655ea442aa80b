"""The size of the tiles of logits in linear_cross_entropy: so many tokens by so many entries exist at a time."""

from typing import NamedTuple

import torch

# Bytes of a tile. On a GPU: enough tokens to fill it with work, little beside the weights. On a CPU: the fewer chunks
# the fewer passes over dw, and the peak at 4096 tokens, 768 -> 50304, stays below 1/8 of that with whole logits.
_TILE_BYTES = {"gpu": 256 << 20, "cpu": 100 << 20}
# Where the product is made in float32 for 16-bit operands, blocks of entries are cast as they are used, and the tile is
# small beside the caches; up to so many tokens at once no gradient of a weight needs an accumulator.
_CAST_TILE_BYTES = 8 << 20
_CAST_TOKENS = 8192
_CPU_HAS_MATRIX_UNITS = {
    torch.bfloat16: torch.cpu._is_amx_tile_supported(),
    torch.float16: torch.cpu._is_amx_fp16_supported(),
}
# Rows of a tile and blocks of entries begin at multiples of so many elements: what matrix units and wide loads want.
_ALIGNMENT = 64


class TileShape(NamedTuple):
    """Tokens and entries of a tile, and the dtype that it is made in."""

    tokens: int
    entries: int
    dtype: torch.dtype


def tiles_of(
    hidden: torch.Tensor, num_tokens: int, num_entries: int, chunk_tokens: int | None, num_tiles: int = 1
) -> TileShape:
    """The tiles of a head whose operands have the dtype and the device of hidden."""
    product, device = product_dtype(hidden), hidden.device.type
    return TileShape(
        *tile_shape(num_tokens, num_entries, hidden.dtype, product, device, chunk_tokens, num_tiles), product
    )


def tile_bytes(device: str) -> int:
    """The most bytes of a tile on a type of device."""
    return _TILE_BYTES["cpu" if device == "cpu" else "gpu"]


def padded_width(num_entries: int) -> int:
    """The columns that a tile of so many entries has in memory."""
    return -(-num_entries // _ALIGNMENT) * _ALIGNMENT


def product_dtype(operand: torch.Tensor) -> torch.dtype:
    """The dtype that products of 16-bit operands are made in.

    On a GPU, and on a CPU with matrix units for it, that of the operands. Other CPUs multiply float32 at least as fast
    as 16-bit numbers, so the operands are widened tile by tile, and neither logits nor partial sums are rounded.
    """
    dtype = operand.dtype
    native = operand.device.type != "cpu" or dtype.itemsize != 2 or _CPU_HAS_MATRIX_UNITS[dtype]
    return dtype if native else torch.float32


def tile_shape(
    num_tokens: int,
    num_entries: int,
    dtype: torch.dtype,
    product: torch.dtype,
    device: str,
    chunk_tokens: int | None,
    num_tiles: int = 1,
) -> tuple[int, int]:
    """(tokens, entries) of one of num_tiles: chunks of tokens by all entries or, where operands are cast, both cut."""
    if dtype == product:
        row_bytes = max(1, num_entries) * product.itemsize
        most = tile_bytes(device) // row_bytes
        most = most if num_tokens <= most else most // num_tiles  # one tile is enough where it holds all
        return chunk_tokens or _even_share(num_tokens, most), max(1, num_entries)
    tokens = chunk_tokens or _even_share(num_tokens, _CAST_TOKENS)
    return tokens, _even_share(num_entries, _CAST_TILE_BYTES // (max(1, min(tokens, num_tokens)) * product.itemsize))


def _even_share(total: int, most: int) -> int:
    """A part of about the same size for each, at most `most` (and at least the alignment), in whole alignments."""
    most = max(_ALIGNMENT, most // _ALIGNMENT * _ALIGNMENT)
    num_parts = max(1, -(-total // most))
    return min(most, -(-max(1, total) // num_parts // _ALIGNMENT) * _ALIGNMENT) if num_parts > 1 else max(1, total)
