"""Packing of parameters into one block of memory for each rank, which holds the rows that the rank owns."""

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.distributed as dist

from fused_megatron.collectives.transfers import start_all_gather_blocks
from fused_megatron.sharding import RowShards
from fused_megatron.sharding.row_shards import num_rows


class RowBlocks:
    """Layout of the rows of some parameters in blocks [num_shards, block_numel], one block for each rank.

    A rank's block has its rows of each parameter, one parameter behind the other. Every parameter takes the room of
    ceil(rows / num_shards) rows in each block, so that all blocks have one size; unused room is padding.

    Args:
        shapes: of the parameters.
        rows: how each is cut.

    Attributes:
        block_numel: elements of a block.
        padded: whether some block has padding.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], rows: RowShards) -> None:
        self._shards = rows.num_shards
        self._rows = rows
        self._shapes = [tuple(shape) for shape in shapes]
        self._rooms = [rows.rows_per_shard(shape) * prod(shape[1:]) for shape in self._shapes]
        self.block_numel = sum(self._rooms)
        self.padded = any(num_rows(shape) % self._shards for shape in self._shapes)

    def new_blocks(self, like: torch.Tensor) -> torch.Tensor:
        """Memory for the blocks, in the dtype and on the device of a tensor; padding is 0."""
        # Padding is summed with the rest, and must not make a signalling value of what memory happens to hold.
        make = like.new_zeros if self.padded else like.new_empty
        return make((self._shards, self.block_numel))

    def pack(self, tensors: Sequence[torch.Tensor], blocks: torch.Tensor) -> torch.Tensor:
        """Copy contiguous tensors in the parameters' shapes into blocks [num_shards, block_numel]; the blocks."""
        for place, source in self._pairs(tensors, blocks):
            place.copy_(source)
        return blocks

    def unpack(self, blocks: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Copy blocks [num_shards, block_numel] back into contiguous tensors in the parameters' shapes."""
        for place, target in self._pairs(tensors, blocks):
            target.copy_(place)

    def pack_own(self, tensors: Sequence[torch.Tensor], block: torch.Tensor) -> torch.Tensor:
        """Copy this rank's rows of tensors in the parameters' shapes into its block [block_numel]; the block."""
        for place, rows in self._own_pairs(tensors, block):
            place.copy_(rows)
        return block

    def unpack_own(self, block: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
        """Copy this rank's block [block_numel] into its rows of tensors in the parameters' shapes."""
        for place, rows in self._own_pairs(tensors, block):
            rows.copy_(place)

    def start_gather(self, tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> Callable[[], None]:
        """Begin to send this rank's rows to all ranks; the result waits, and fills the other rows of the tensors.

        Args:
            tensors: contiguous, of one dtype, in the parameters' shapes.
            group: the ranks that own the other rows.
        """
        # Padding has no values: it is received and never read.
        own = self.pack_own(tensors, tensors[0].new_empty(self.block_numel))
        transfer = start_all_gather_blocks(own, tensors[0].new_empty(self._shards, self.block_numel), group)
        return lambda: self.unpack(transfer.wait(), tensors)

    def _pairs(self, tensors: Sequence[torch.Tensor], blocks: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views of the blocks and of the tensors that hold the same elements."""
        pairs, offset = [], 0
        for tensor, shape, room in zip(tensors, self._shapes, self._rooms, strict=True):
            flat = tensor.view(-1)
            whole = flat.numel() // room if room else 0  # blocks that this parameter fills
            end = whole * room
            if whole:
                pairs.append((blocks[:whole, offset : offset + room], flat[:end].view(whole, room)))
            if end < flat.numel():
                rest = flat[end:]
                pairs.append((blocks[whole, offset : offset + rest.numel()], rest))
            assert num_rows(shape) == 0 or whole <= self._shards
            offset += room
        return pairs

    def _own_pairs(
        self, tensors: Sequence[torch.Tensor], block: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pairs, offset = [], 0
        for tensor, room in zip(tensors, self._rooms, strict=True):
            rows = self._rows.own(tensor)
            pairs.append((block[offset : offset + rows.numel()].view(rows.shape), rows))
            offset += room
        return pairs


def gather_whole(
    own: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]], rows: RowShards, group: dist.ProcessGroup | None
) -> list[torch.Tensor]:
    """Return whole tensors, of which each rank of a group has its rows. Every rank of the group calls it.

    Args:
        own: this rank's rows of each tensor, of one dtype; the tensors themselves where there is one shard.
        shapes: of the whole tensors.
        rows: how each is cut.
        group: the ranks that have the other rows.

    Communication: one all-gather of all tensors together.
    Memory: the whole tensors, and once more while they are gathered.
    """
    if group is None or rows.num_shards == 1 or not own:
        return list(own)
    whole = [tensor.new_empty(tuple(shape)) for tensor, shape in zip(own, shapes, strict=True)]
    for target, source in zip(whole, own, strict=True):
        rows.own(target).copy_(source)
    RowBlocks(shapes, rows).start_gather(whole, group)()
    return whole
