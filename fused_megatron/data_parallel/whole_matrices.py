"""Computation on whole matrices whose parts are on several ranks: one rank computes, every rank gets its part."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.collectives import group_rank, meet
from fused_megatron.collectives.transport.select import start
from fused_megatron.observe.waits import COMMUNICATION, wait_for
from fused_megatron.sharding import RowShards, ShardPart, parameter_parts
from fused_megatron.sharding.box import Box


@dataclass(frozen=True)
class Matrix:
    """A full parameter of two dims, in parts on the ranks of a group.

    Attributes:
        name: name of the parameter that holds the matrix, or stacks it with others.
        full_name: name of the full matrix in the whole model.
        shape: shape of the full matrix.
        boxes: the part of each rank of the group; an empty box for a rank without a part.
        rows: rows of this rank's part, in dim 0 of its tensor of the parameter.
    """

    name: str
    full_name: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    rows: slice

    @property
    def largest_part(self) -> int:
        """Return the number of elements of the largest part."""
        return max(box.volume for box in self.boxes)


class WholeMatrices:
    """Matrices of some parameters, each with the rank that computes it.

    Matrices are sorted by size and dealt to the ranks in rounds, one to each rank. So all ranks of a round compute
    matrices of about the same size, and a rank holds one whole matrix at a time.

    Args:
        parameters: parameters of two dims, with the records of their shards; a stacked parameter has a matrix for each
            part.
        rows: the rows of each parameter that this rank holds.
        group: the R tensor-parallel ranks of each row shard, one row shard after the other; None for one rank. For
            experts the ranks that share each expert take the place of tensor-parallel ranks.
        tp_size: R. Tensor parallelism cuts every matrix into equal blocks.

    Communication of map(): two all-to-alls in each round, of blocks with room for the largest part of the round.
    Memory of map(): one matrix, and the blocks of a round twice.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], rows: RowShards, group: dist.ProcessGroup | None, tp_size: int
    ) -> None:
        self.parameters = parameters
        self._group, self._rank, self._num_ranks = group, group_rank(group), rows.num_shards * tp_size
        assert (1 if group is None else group.size()) == self._num_ranks
        meet(group)
        found = [m for name, p in parameters.items() for m in _matrices_of(name, p, rows, tp_size, self._rank)]
        # The order is the same on every rank: full shapes and names decide it.
        self.matrices = sorted(found, key=lambda matrix: (-prod(matrix.shape), matrix.full_name))

    def map(
        self,
        part_of: Callable[[Matrix], torch.Tensor],
        function: Callable[[torch.Tensor], torch.Tensor],
        like: torch.Tensor,
    ) -> Iterator[tuple[Matrix, torch.Tensor]]:
        """Apply a function to every whole matrix; each rank gets its part. Every rank of the group must call it.

        Args:
            part_of: returns this rank's part of a matrix, in the shape of its box; called once for each matrix.
            function: takes a whole matrix and returns a matrix of the same shape and dtype.
            like: a tensor with the dtype and the device of the parts.

        Yields:
            Each matrix with this rank's part of its result; the part is valid until the next iteration.
        """
        for first in range(0, len(self.matrices), self._num_ranks):
            matrices = self.matrices[first : first + self._num_ranks]
            if self._group is None:
                yield matrices[0], function(part_of(matrices[0]))
            else:
                yield from self._map_round(matrices, part_of, function, like)

    def _map_round(
        self,
        matrices: Sequence[Matrix],
        part_of: Callable[[Matrix], torch.Tensor],
        function: Callable[[torch.Tensor], torch.Tensor],
        like: torch.Tensor,
    ) -> Iterator[tuple[Matrix, torch.Tensor]]:
        # Padding behind a part is sent and never read. Zeros: uninitialised memory could hold signalling values.
        rooms = like.new_zeros(self._num_ranks, max(matrix.largest_part for matrix in matrices))
        for owner, matrix in enumerate(matrices):
            box = matrix.boxes[self._rank]
            rooms[owner, : box.volume] = part_of(matrix).reshape(-1)
        received = self._exchanged(rooms)
        if self._rank < len(matrices):
            mine = matrices[self._rank]
            whole = like.new_empty(mine.shape)
            for box, room in zip(mine.boxes, received, strict=True):
                whole[box.slices()] = room[: box.volume].view(box.shape)
            result = function(whole)
            for box, room in zip(mine.boxes, rooms, strict=True):
                room[: box.volume].view(box.shape).copy_(result[box.slices()])
        received = self._exchanged(rooms)
        for owner, matrix in enumerate(matrices):
            box = matrix.boxes[self._rank]
            yield matrix, received[owner, : box.volume].view(box.shape)

    def _exchanged(self, rooms: torch.Tensor) -> torch.Tensor:
        """Send row r of rooms [ranks, n] to rank r; return the rows from all ranks, in rank order."""
        received = torch.empty_like(rooms)
        for work in start(dist.all_to_all_single, self._group, received.view(-1), rooms.view(-1)):
            wait_for(COMMUNICATION, work.wait)
        return received


def _matrices_of(name: str, parameter: nn.Parameter, rows: RowShards, tp_size: int, rank: int) -> Iterator[Matrix]:
    assert parameter.dim() == 2
    shape = tuple(parameter.shape)
    shards = [replace(rows, index=index) for index in range(rows.num_shards)]
    for part in parameter_parts(parameter):
        boxes: list[Box] = []
        held: list[slice] = []
        for shard in shards:
            for tp_rank in range(tp_size):
                box, part_rows = _held(_on_rank(part, shape, tp_rank, tp_size), shard, shape)
                boxes.append(box)
                held.append(part_rows)
        mine = _held(part, shards[rank // tp_size], shape)[0]
        assert boxes[rank] == mine, f"{part.full_name(name)} is not cut into equal blocks: {boxes[rank]}, {mine}"
        yield Matrix(name, part.full_name(name), part.shard.full_shape, tuple(boxes), held[rank])


def _on_rank(part: ShardPart, shape: Sequence[int], tp_rank: int, tp_size: int) -> ShardPart:
    """Return another tensor-parallel rank's part of a matrix that is cut into equal blocks.

    With fewer blocks than ranks, neighbouring ranks hold copies of a block.
    """
    local = (len(range(shape[0])[part.rows]), *shape[1:])
    offset = []
    for full, size in zip(part.shard.full_shape, local, strict=True):
        blocks = full // size
        offset.append(tp_rank * blocks // tp_size * size)
    return replace(part, shard=replace(part.shard, offset=tuple(offset)))


def _held(part: ShardPart, rows: RowShards, shape: Sequence[int]) -> tuple[Box, slice]:
    """Return the box of a part that a row shard holds, and its rows in the row shard's tensor."""
    start = rows.rows(shape).start
    for cut in rows.cut((part,), shape):
        size = (cut.rows.stop - cut.rows.start, *shape[1:])
        return cut.shard.block(size), slice(cut.rows.start - start, cut.rows.stop - start)
    return Box((0,) * len(shape), (0, *shape[1:])), slice(0, 0)
