"""Plan of one rank for context-parallel attention: what it computes, sends and receives, made on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch

from fused_megatron.ops.attention import AttentionMask
from fused_megatron.ops.visible_pairs import PairTile, Visibility
from fused_megatron.sharding import SequencePartition
from fused_megatron.sharding.sequence_partition import joined_ranges

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Hop:
    """One step of a ring: attention over the keys of one member, which sent the rows that are needed.

    Attributes:
        source: member of the ring whose keys this member uses, as a rank of the group.
        target: member that uses keys of this member in the same hop, as a rank of the group.
        tiles: own queries and the rows of the message that see each other.
        received: rows of the source in the message, as ranges; the message has them one after the other.
        sent: own rows in the message to the target, as ranges.
    """

    source: int
    target: int
    tiles: tuple[PairTile, ...]
    received: Ranges
    sent: Ranges


@dataclass(frozen=True)
class AttentionPlan:
    """What one rank does in the attention of a microbatch.

    Attributes:
        sizes: rows of every rank of the context-parallel group.
        rank: this rank in the group.
        neighbours: ranks of the group that exchange heads for rows, this one among them; only this one: no exchange.
        ring: ranks of the group that exchange keys, this one among them.
        hops: steps of the ring; the first is for the member's own keys. Empty where keys are gathered.
        own_halves: the tiles of the first hop in two parts with equal pairs: the backward begins and ends with them.
        tiles: where keys are gathered: own queries and all keys, in the order of their positions.
        order: where keys are gathered: as SequencePartition.order.
    """

    sizes: tuple[int, ...]
    rank: int
    neighbours: tuple[int, ...]
    ring: tuple[int, ...]
    hops: tuple[Hop, ...] = ()
    own_halves: tuple[tuple[PairTile, ...], tuple[PairTile, ...]] = ((), ())
    tiles: tuple[PairTile, ...] = ()
    order: tuple[tuple[int, int, int], ...] = ()


# Plans by partition: all layers of a microbatch have the same, and the host work of a plan grows with the documents.
# An entry has the documents that it was made for, so that their id is no other tensor's.
_plans: WeakKeyDictionary[SequencePartition, dict[tuple[object, ...], tuple[torch.Tensor | None, AttentionPlan]]]
_plans = WeakKeyDictionary()


def plan_of(
    partition: SequencePartition, mask: AttentionMask, batch: int, rank: int, neighbours: int, gathered: bool
) -> AttentionPlan:
    """Return the plan of a rank; the last plan of each kind is kept as long as the partition.

    Args:
        partition: positions of each rank.
        mask: what each query sees; documents on the CPU, not changed later.
        batch: B.
        rank: this rank in the context-parallel group.
        neighbours: number of neighbouring ranks that exchange heads for rows.
        gathered: whether each rank gathers all keys; otherwise they go around a ring.

    Raises:
        InputError: documents that are no cumulative lengths of all tokens.
    """
    known = _plans.setdefault(partition, {})
    key = (mask.causal, mask.window, batch, rank, neighbours, gathered)
    if key not in known or known[key][0] is not mask.documents:
        visibility = mask.visibility(batch, partition.seq_len)
        make = _gathering_plan if gathered else _ring_plan
        known[key] = mask.documents, make(partition, visibility, rank, neighbours)
    return known[key][1]


def _gathering_plan(partition: SequencePartition, visibility: Visibility, rank: int, neighbours: int) -> AttentionPlan:
    return AttentionPlan(
        partition.sizes,
        rank,
        (rank,),
        tuple(range(partition.num_ranks)),
        tiles=visibility.tiles(partition.layouts[rank].ranges, ((0, partition.seq_len),)),
        order=partition.order,
    )


def _ring_plan(partition: SequencePartition, visibility: Visibility, rank: int, neighbours: int) -> AttentionPlan:
    groups = [range(first, first + neighbours) for first in range(0, partition.num_ranks, neighbours)]
    rows = [joined_ranges([each for member in group for each in partition.layouts[member].ranges]) for group in groups]
    me, offset = divmod(rank, neighbours)
    count = len(groups)
    hops = []
    for step in range(count):
        source, target = (me - step) % count, (me + step) % count
        tiles = visibility.tiles(rows[me], rows[source])
        received: Ranges = ((0, _length(rows[me])),)
        sent = received
        if step > 0:
            received = _needed(tiles)
            tiles = _in_message(tiles, received)
            sent = _needed(visibility.tiles(rows[target], rows[me]))
        hops.append(Hop(groups[source][offset], groups[target][offset], tiles, received, sent))
    return AttentionPlan(
        partition.sizes,
        rank,
        tuple(groups[me]),
        tuple(group[offset] for group in groups),
        hops=tuple(hops),
        own_halves=_halves(hops[0].tiles) if count > 1 else (hops[0].tiles, ()),
    )


def _halves(tiles: Sequence[PairTile]) -> tuple[tuple[PairTile, ...], tuple[PairTile, ...]]:
    """Cut tiles into two parts with about the same number of pairs; one tile is cut between two queries."""
    left = sum(tile.num_pairs for tile in tiles) / 2
    for index, tile in enumerate(tiles):
        if tile.num_pairs >= left:
            row = min(max(1, round(tile.num_queries * left / tile.num_pairs)), tile.num_queries - 1)
            cut = _cut_before(tile, row) if row > 0 else ((tile,), ())
            return (*tiles[:index], *cut[0]), (*cut[1], *tiles[index + 1 :])
        left -= tile.num_pairs
    return tuple(tiles), ()


def _cut_before(tile: PairTile, row: int) -> tuple[tuple[PairTile, ...], tuple[PairTile, ...]]:
    """Cut a tile before one of its queries; each part has only keys that it needs."""
    last_key = tile.num_keys - 1
    end = last_key if tile.upper is None else min(last_key, row - 1 + tile.upper)
    begin = 0 if tile.lower is None else max(0, row + tile.lower)
    return (tile.part(0, row - 1, 0, end),), (tile.part(row, tile.num_queries - 1, begin, last_key),)


def _length(ranges: Sequence[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)


def _needed(tiles: Sequence[PairTile]) -> Ranges:
    """Return the key rows of the tiles, as ascending ranges that neither overlap nor touch."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted({tile.keys for tile in tiles}):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return tuple(found)


def _in_message(tiles: Sequence[PairTile], received: Ranges) -> tuple[PairTile, ...]:
    """Return tiles whose key rows are rows of the message instead of rows of its sender."""
    found, first = [], 0
    shifts = []
    for start, stop in received:
        shifts.append((start, stop, first - start))
        first += stop - start
    for tile in tiles:
        shift = next(shift for start, stop, shift in shifts if start <= tile.keys[0] < stop)
        found.append(replace(tile, keys=(tile.keys[0] + shift, tile.keys[1] + shift)))
    return tuple(found)
