"""Attention of tiles on torch's flash kernel for GPUs: one launch for all tiles that share no row and have one band."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from fused_megatron.ops.attention_operands import Backward, Operands
from fused_megatron.ops.visible_pairs import PairTile

_NO_BOUND = -1


class FlashOnGpu:
    """torch's flash kernel for GPUs, which knows bands and sequences of different lengths."""

    name = "torch's flash kernel for GPUs"

    def forward(
        self, operands: Operands, tiles: Sequence[PairTile]
    ) -> Iterator[tuple[PairTile, torch.Tensor, torch.Tensor]]:
        """Yield tiles with their context [b, N, q, Dv] and log-sum-exp [b, N, q]."""
        for launch in plan_launches(tuple(tiles)):
            context, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
                launch.pack_queries(operands.query),
                launch.pack_keys(operands.key),
                launch.pack_keys(operands.value),
                *launch.lengths(operands.query.device),
                0.0,
                False,
                False,
                scale=operands.scale,
                window_size_left=launch.left,
                window_size_right=launch.right,
            )
            yield from zip(
                launch.tiles,
                launch.unpack_queries(context),
                [each.squeeze(-1) for each in launch.unpack_queries(log_sum_exp.t().unsqueeze(-1))],
                strict=True,
            )

    def backward(
        self, operands: Operands, saved: Backward, tiles: Sequence[PairTile]
    ) -> Iterator[tuple[PairTile, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield tiles with the gradients of their query, key and value."""
        for launch in plan_launches(tuple(tiles)):
            log_sum_exp = launch.pack_queries(saved.log_sum_exp.unsqueeze(-1)).squeeze(-1).t().contiguous()
            no_random = torch.zeros(2, dtype=torch.uint64, device=operands.query.device)
            gradients = torch.ops.aten._flash_attention_backward(
                launch.pack_queries(saved.grad),
                launch.pack_queries(operands.query),
                launch.pack_keys(operands.key),
                launch.pack_keys(operands.value),
                launch.pack_queries(saved.context),
                log_sum_exp,
                *launch.lengths(operands.query.device),
                0.0,
                False,
                no_random,
                no_random,
                scale=operands.scale,
                window_size_left=launch.left,
                window_size_right=launch.right,
            )
            yield from zip(
                launch.tiles,
                launch.unpack_queries(gradients[0]),
                launch.unpack_keys(gradients[1]),
                launch.unpack_keys(gradients[2]),
                strict=True,
            )


@dataclass(frozen=True)
class Launch:
    """Tiles that one launch computes: no two share a query row or a key row.

    Attributes:
        tiles: in the order of their rows in the packed operands, sample after sample.
        left, right: the kernel's window, which aligns the last query of a sequence with its last key; -1: no bound.
    """

    tiles: tuple[PairTile, ...]
    left: int
    right: int

    def pack_queries(self, x: torch.Tensor) -> torch.Tensor:
        """Return the query rows of the tiles, [T, N, dim] of [Sq, B, N, dim]."""
        return _pack(x, [(tile.samples, tile.queries) for tile in self.tiles])

    def pack_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Return the key rows of the tiles, [T, G, dim] of [Sk, B, G, dim]."""
        return _pack(x, [(tile.samples, tile.keys) for tile in self.tiles])

    def unpack_queries(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """Return the parts of packed query rows, [b, N, q, dim] each."""
        return _unpack(packed, [(tile.num_samples, tile.num_queries) for tile in self.tiles])

    def unpack_keys(self, packed: torch.Tensor) -> list[torch.Tensor]:
        """Return the parts of packed key rows, [b, G, k, dim] each."""
        return _unpack(packed, [(tile.num_samples, tile.num_keys) for tile in self.tiles])

    def lengths(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Return the cumulative numbers of queries and of keys, [n + 1] int32 each, and the largest of both."""
        queries = [tile.num_queries for tile in self.tiles for _ in range(tile.num_samples)]
        keys = [tile.num_keys for tile in self.tiles for _ in range(tile.num_samples)]
        host = torch.tensor([[0, *queries], [0, *keys]]).cumsum(1, dtype=torch.int32)
        # Only a copy from pinned memory lets the host go on.
        moved = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
        return moved[0], moved[1], max(queries), max(keys)


@lru_cache(maxsize=64)
def plan_launches(tiles: tuple[PairTile, ...]) -> tuple[Launch, ...]:
    """Put each tile into the first launch that has no row of it and whose window gives its band."""
    launches: list[Launch] = []
    for tile in tiles:
        for i, launch in enumerate(launches):
            window = _common_window(launch, tile)
            if window is not None and not any(_share_a_row(tile, other) for other in launch.tiles):
                launches[i] = Launch((*launch.tiles, tile), *window)
                break
        else:
            launches.append(Launch((tile,), *_window(tile)))
    return tuple(launches)


def _window(tile: PairTile) -> tuple[int, int]:
    """Return the kernel's (left, right) for a tile."""
    shift = tile.num_keys - tile.num_queries
    left = _NO_BOUND if tile.lower is None else shift - tile.lower
    right = _NO_BOUND if tile.upper is None else tile.upper - shift
    return left, right


def _common_window(launch: Launch, tile: PairTile) -> tuple[int, int] | None:
    """Return a window that gives the band of the tile and of all tiles of a launch; None if there is none."""
    tiles = (*launch.tiles, tile)
    windows = [_window(each) for each in tiles]
    # A tile without a bound takes every bound that hides nothing of it: left >= its keys - 1, right >= its queries - 1.
    left = _common_bound([w[0] for w in windows], [t.num_keys - 1 for t in tiles])
    right = _common_bound([w[1] for w in windows], [t.num_queries - 1 for t in tiles])
    return None if left is None or right is None else (left, right)


def _common_bound(bounds: Sequence[int], harmless: Sequence[int]) -> int | None:
    """Return the bound of all tiles; None if two differ, or if it would hide something where there is no bound."""
    found = set(bounds) - {_NO_BOUND}
    if not found:
        return _NO_BOUND
    bound = found.pop()
    free = [least for each, least in zip(bounds, harmless, strict=True) if each == _NO_BOUND]
    return None if found or bound < max(free, default=0) else bound


def _share_a_row(one: PairTile, other: PairTile) -> bool:
    def meet(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a[0] < b[1] and b[0] < a[1]

    return meet(one.samples, other.samples) and (meet(one.queries, other.queries) or meet(one.keys, other.keys))


def _pack(x: torch.Tensor, parts: list[tuple[tuple[int, int], tuple[int, int]]]) -> torch.Tensor:
    """Return the (samples, rows) of x [S, B, heads, dim] one after the other, [sum of b rows, heads, dim].

    A view if they are consecutive rows of one sample.
    """
    samples = parts[0][0]
    ends = [rows[1] for _, rows in parts]
    in_order = all(other == samples for other, _ in parts) and [rows[0] for _, rows in parts[1:]] == ends[:-1]
    if samples[1] - samples[0] == 1 and in_order:
        return x[parts[0][1][0] : ends[-1], samples[0]]
    return torch.cat([x[slice(*rows), slice(*part)].transpose(0, 1).flatten(0, 1) for part, rows in parts])


def _unpack(packed: torch.Tensor, shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Return the parts of (samples b, rows) of a packed tensor, as views [b, heads, rows, dim]."""
    parts = packed.split([samples * rows for samples, rows in shapes])
    return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]
