"""Size of the tiles of logits in linear_cross_entropy: tokens and vocabulary entries per tile."""

from typing import NamedTuple

import torch

# Bytes of a tile. GPU: enough tokens to keep it busy, and little memory beside the weights. CPU: large, since every
# chunk needs a pass over dw; at 4096 tokens, 768 -> 50304, the peak stays below 1/8 of the peak with all logits.
_TILE_BYTES = {"gpu": 256 << 20, "cpu": 100 << 20}
# Where 16-bit operands are multiplied in float32, each block of entries is cast when it is used, and the tile fits in
# the caches. Up to _CAST_TOKENS tokens form one chunk, so that the weight's gradient needs no accumulator.
_CAST_TILE_BYTES = 8 << 20
_CAST_TOKENS = 8192
_CPU_HAS_MATRIX_UNITS = {
    torch.bfloat16: torch.cpu._is_amx_tile_supported(),
    torch.float16: torch.cpu._is_amx_fp16_supported(),
}
# Rows of a tile and blocks of entries begin at multiples of 64 elements, for matrix units and wide loads.
_ALIGNMENT = 64


class TileShape(NamedTuple):
    """Tokens and vocabulary entries of a tile, and its dtype."""

    tokens: int
    entries: int
    dtype: torch.dtype


def tiles_of(
    hidden: torch.Tensor, num_tokens: int, num_entries: int, chunk_tokens: int | None, num_tiles: int = 1
) -> TileShape:
    """Return the tile shape for operands with the dtype and the device of hidden."""
    product = product_dtype(hidden)
    device = hidden.device.type
    return TileShape(
        *tile_shape(num_tokens, num_entries, hidden.dtype, product, device, chunk_tokens, num_tiles), product
    )


def tile_bytes(device: str) -> int:
    """Return the maximum bytes of a tile on a type of device."""
    return _TILE_BYTES["cpu" if device == "cpu" else "gpu"]


def padded_width(num_entries: int) -> int:
    """Return the allocated columns of a tile with num_entries entries."""
    return -(-num_entries // _ALIGNMENT) * _ALIGNMENT


def product_dtype(operand: torch.Tensor) -> torch.dtype:
    """Return the dtype in which products of these operands are computed.

    A GPU, and a CPU with matrix units for the operands' dtype, use that dtype. Other CPUs multiply float32 at least as
    fast as 16-bit numbers: operands are cast tile by tile, and neither logits nor partial sums are rounded.
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
    """Return (tokens, entries) of one of num_tiles tiles: all entries, except where operands are cast to float32."""
    if dtype == product:
        row_bytes = max(1, num_entries) * product.itemsize
        most = tile_bytes(device) // row_bytes
        most = most if num_tokens <= most else most // num_tiles  # one tile is enough if it holds all tokens
        return chunk_tokens or _even_share(num_tokens, most), max(1, num_entries)
    tokens = chunk_tokens or _even_share(num_tokens, _CAST_TOKENS)
    return tokens, _even_share(num_entries, _CAST_TILE_BYTES // (max(1, min(tokens, num_tokens)) * product.itemsize))


def _even_share(total: int, most: int) -> int:
    """Split total into parts of about equal size, at most `most` and a multiple of the alignment; return the size."""
    most = max(_ALIGNMENT, most // _ALIGNMENT * _ALIGNMENT)
    num_parts = max(1, -(-total // most))
    return min(most, -(-max(1, total) // num_parts // _ALIGNMENT) * _ALIGNMENT) if num_parts > 1 else max(1, total)
