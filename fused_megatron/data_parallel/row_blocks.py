"""Packing of parameters into one block of memory for each rank: a block holds the rows that its rank owns."""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from math import prod

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.collectives.transfers import start_all_gather_blocks
from fused_megatron.data_parallel.fixed_sizes import aligned
from fused_megatron.sharding import RowShards


class RowBlocks:
    """Layout of the rows of some parameters in blocks [num_shards, block_numel], one block for each rank.

    A rank's block has its rows of each parameter, one parameter after the other. Every parameter takes the room of
    ceil(rows / num_shards) rows in each block, so that all blocks have the same size, rounded up to an aligned address.
    Unused room is padding.

    Args:
        shapes: shapes of the parameters.
        rows: the cut of each parameter into rows.

    Attributes:
        block_numel: elements of a block.
        padded: whether some block has padding.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], rows: RowShards) -> None:
        self._shards = rows.num_shards
        self._shapes = [tuple(shape) for shape in shapes]
        self._rows = rows
        self._rooms = [rows.rows_per_shard(shape) * prod(shape[1:]) for shape in self._shapes]
        self._offsets = list(accumulate(map(aligned, self._rooms), initial=0))
        self.block_numel = self._offsets[-1]
        self.padded = self.block_numel * self._shards > sum(map(prod, self._shapes))

    def new_blocks(self, like: torch.Tensor) -> torch.Tensor:
        """Allocate the blocks, in the dtype and on the device of a tensor; padding is 0."""
        # Padding is summed with the rest; uninitialised memory could hold signalling values.
        make = like.new_zeros if self.padded else like.new_empty
        return make((self._shards, self.block_numel))

    def pack(self, tensors: Sequence[torch.Tensor], blocks: torch.Tensor) -> torch.Tensor:
        """Copy contiguous tensors in the parameters' shapes into blocks [num_shards, block_numel]; return these."""
        for index, source in enumerate(tensors):
            self.pack_one(index, source, blocks)
        return blocks

    def pack_one(self, index: int, tensor: torch.Tensor | None, blocks: torch.Tensor) -> None:
        """Copy the tensor of the parameter with this index into blocks; None counts as zeros."""
        if tensor is None:
            blocks[:, self._offsets[index] : self._offsets[index + 1]].zero_()
            return
        for place, source in self._pairs(index, tensor, blocks):
            place.copy_(source)

    def unpack(self, blocks: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Copy blocks [num_shards, block_numel] back into contiguous tensors in the parameters' shapes."""
        for index, tensor in enumerate(tensors):
            for place, target in self._pairs(index, tensor, blocks):
                target.copy_(place)

    def own_rows(self, block: torch.Tensor) -> list[torch.Tensor]:
        """Return this rank's rows of every parameter as views of its block [block_numel]."""
        found = []
        for shape, offset in zip(self._shapes, self._offsets, strict=False):
            own = self._rows.own_shape(shape)
            found.append(block[offset : offset + prod(own)].view(own))
        return found

    def pack_own(self, tensors: Sequence[torch.Tensor], block: torch.Tensor) -> torch.Tensor:
        """Copy this rank's rows of tensors in the parameters' shapes into its block [block_numel]; return the block."""
        for place, tensor in zip(self.own_rows(block), tensors, strict=True):
            place.copy_(self._rows.own(tensor))
        return block

    def unpack_own(self, block: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Copy this rank's block [block_numel] into its rows of tensors in the parameters' shapes."""
        for place, tensor in zip(self.own_rows(block), tensors, strict=True):
            self._rows.own(tensor).copy_(place)

    def start_gather(self, tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> Callable[[], None]:
        """Start to send this rank's rows to all ranks; the returned function waits and fills the tensors' other rows.

        Args:
            tensors: contiguous tensors of one dtype, in the parameters' shapes.
            group: the ranks that own the other rows.
        """
        # Padding is not initialised: it is received and never read.
        receive = self.start_receive(self.pack_own(tensors, tensors[0].new_empty(self.block_numel)), group)
        return lambda: self.unpack(receive(), tensors)

    def start_receive(self, block: torch.Tensor, group: dist.ProcessGroup | None) -> Callable[[], torch.Tensor]:
        """Start to gather the blocks of all ranks; the returned function waits and returns [num_shards, block_numel].

        Args:
            block: this rank's block [block_numel].
            group: the ranks that have the other blocks; None for one rank.
        """
        if group is None:
            return lambda: block.view(1, -1)
        return start_all_gather_blocks(block, block.new_empty(self._shards, self.block_numel), group).wait

    def _pairs(self, index: int, tensor: torch.Tensor, blocks: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return views of the blocks and of the tensor of a parameter that hold the same elements."""
        pairs, offset, room = [], self._offsets[index], self._rooms[index]
        flat = tensor.view(-1)
        whole = flat.numel() // room if room else 0  # blocks that this parameter fills
        end = whole * room
        if whole:
            pairs.append((blocks[:whole, offset : offset + room], flat[:end].view(whole, room)))
        if end < flat.numel():
            rest = flat[end:]
            pairs.append((blocks[whole, offset : offset + rest.numel()], rest))
        return pairs


def by_dtype(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters by dtype, in their order: the rows of a block have one dtype."""
    groups: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.dtype, []).append(parameter)
    return list(groups.values())


def gather_whole(
    own: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]], rows: RowShards, group: dist.ProcessGroup | None
) -> list[torch.Tensor]:
    """Gather whole tensors from their rows on the ranks of a group. Every rank of the group calls it.

    Args:
        own: this rank's rows of each tensor, of one dtype; the tensors themselves if there is one shard.
        shapes: shapes of the whole tensors.
        rows: the cut of each tensor into rows.
        group: the ranks that have the other rows.

    Communication: one all-gather of all tensors together.
    Memory: the whole tensors, twice while they are gathered.
    """
    if group is None or rows.num_shards == 1 or not own:
        return list(own)
    whole = [tensor.new_empty(tuple(shape)) for tensor, shape in zip(own, shapes, strict=True)]
    for target, source in zip(whole, own, strict=True):
        rows.own(target).copy_(source)
    RowBlocks(shapes, rows).start_gather(whole, group)()
    return whole
