"""Buckets of float32 gradients that are summed over data-parallel ranks together, whole or by rows."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from fused_megatron.collectives import group_size
from fused_megatron.collectives.transfers import start_all_reduce_, start_reduce_scatter_blocks
from fused_megatron.data_parallel.bucket_layout import BucketLayout
from fused_megatron.data_parallel.row_blocks import RowBlocks
from fused_megatron.sharding import ReplicaSet


class Bucket(Protocol):
    """Gradients of some parameters.

    Attributes:
        parameters: parameters in the order in which backward reaches them.
        missing: for each parameter, number of backwards that must still run before the bucket may be sent.
        is_packed: whether the bucket is sent from a packed copy.
        is_sent: whether start_sum() communicates.
        is_own: whether own() of all parameters is all that the bucket holds.
    """

    parameters: tuple[nn.Parameter, ...]
    missing: dict[nn.Parameter, int]
    is_sent: bool

    @property
    def is_packed(self) -> bool: ...

    @property
    def is_own(self) -> bool: ...

    def total(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the tensor, in the shape of the parameter, to which backward adds the gradient."""

    def add(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Add a gradient that autograd made; the bucket may keep the tensor."""

    def own(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the sums over all ranks for the rows that this rank owns."""

    def zero_(self) -> None:
        """Set all gradients to 0."""

    def start_sum(self) -> Callable[[], object]:
        """Start the sum over the ranks that share parameters; the returned function waits for it."""

    def sum_copies(self) -> Callable[[], object]:
        """Start the sum over ranks that own the same rows, once in a step; the returned function waits for it."""


class WholeBucket:
    """Flat float32 tensor of whole gradients, which accumulate over a step and are summed once.

    With several row shards a rank gets only the sums of its own rows. Its other rows have no meaning until zero_().

    Args:
        layout: parameters of the bucket.
        replicas: of these parameters.
    """

    def __init__(self, layout: BucketLayout, replicas: ReplicaSet) -> None:
        self.parameters = layout.parameters
        self.missing: dict[nn.Parameter, int] = {}
        self._replicas, rows = replicas, replicas.rows
        self._blocks = RowBlocks([p.shape for p in layout.parameters], rows) if rows.num_shards > 1 else None
        self.is_sent = replicas.group is not None
        device = layout.parameters[0].device
        self.flat = torch.zeros(layout.num_elements, dtype=torch.float32, device=device)
        self.views = layout.views(self.flat)

    @property
    def is_packed(self) -> bool:
        return self._blocks is not None

    @property
    def is_own(self) -> bool:
        return self._blocks is None

    def total(self, parameter: nn.Parameter) -> torch.Tensor:
        return self.views[parameter]

    def add(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        self.views[parameter].add_(gradient)

    def own(self, parameter: nn.Parameter) -> torch.Tensor:
        return self._replicas.rows.own(self.views[parameter])

    def zero_(self) -> None:
        self.flat.zero_()

    def start_sum(self) -> Callable[[], object]:
        if self._blocks is None:
            return start_all_reduce_(self.flat, self._replicas.copy_group).wait
        packing, views = self._blocks, list(self.views.values())
        blocks = packing.pack(views, packing.new_blocks(self.flat))
        block = self.flat.new_empty(packing.block_numel)
        transfer = start_reduce_scatter_blocks(blocks.view(-1), block, self._replicas.shard_group)
        return lambda: packing.unpack_own(transfer.wait(), views)

    def sum_copies(self) -> Callable[[], object]:
        if self._blocks is None or self._replicas.copy_group is None:
            return _nothing
        packing, views = self._blocks, list(self.views.values())
        block = packing.pack_own(views, self.flat.new_empty(packing.block_numel))
        transfer = start_all_reduce_(block, self._replicas.copy_group)
        return lambda: packing.unpack_own(transfer.wait(), views)


class ShardedBucket:
    """Float32 gradients of this rank's rows, which accumulate over a step; whole gradients exist for one microbatch.

    Backward makes the whole gradient of each parameter. When all parameters of the bucket have a gradient, start_sum
    packs and frees these gradients, and adds the sums of this rank's rows in float32.

    Args: as WholeBucket.

    Memory: 4 bytes for each element of the rank's rows. During a backward also the whole gradients of the bucket, twice
        while they are packed and sent.
    """

    is_packed = is_own = True

    def __init__(self, layout: BucketLayout, replicas: ReplicaSet) -> None:
        assert replicas.rows.num_shards == group_size(replicas.shard_group)
        self.parameters = layout.parameters
        self.missing: dict[nn.Parameter, int] = {}
        self._shards, self._copies = replicas.shard_group, replicas.copy_group
        self.is_sent = self._shards is not None
        self._blocks = RowBlocks([p.shape for p in layout.parameters], replicas.rows)
        device = layout.parameters[0].device
        # The layout of a RowBlocks block, so that one pass adds a received block.
        self._block = torch.zeros(self._blocks.block_numel, dtype=torch.float32, device=device)
        self._own = dict(zip(layout.parameters, self._blocks.own_rows(self._block), strict=True))
        self._whole: dict[nn.Parameter, torch.Tensor] = {}

    def total(self, parameter: nn.Parameter) -> torch.Tensor:
        if self._shards is None:  # this rank owns all rows
            return self._own[parameter]
        if parameter not in self._whole:
            self._whole[parameter] = torch.zeros(parameter.shape, dtype=torch.float32, device=self._block.device)
        return self._whole[parameter]

    def add(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        if self._shards is None or parameter in self._whole:
            self.total(parameter).add_(gradient)
        else:
            self._whole[parameter] = gradient.float().contiguous()

    def own(self, parameter: nn.Parameter) -> torch.Tensor:
        return self._own[parameter]

    def zero_(self) -> None:
        self._block.zero_()
        self._whole.clear()

    def start_sum(self) -> Callable[[], object]:
        if self._shards is None:
            return _nothing
        blocks = self._blocks.new_blocks(self._block)
        for index, parameter in enumerate(self.parameters):  # free each whole gradient once it is packed
            self._blocks.pack_one(index, self._whole.pop(parameter, None), blocks)
        block = self._block.new_empty(self._blocks.block_numel)
        transfer = start_reduce_scatter_blocks(blocks.view(-1), block, self._shards)
        return lambda: self._block.add_(transfer.wait())

    def sum_copies(self) -> Callable[[], object]:
        return _nothing if self._copies is None else start_all_reduce_(self._block, self._copies).wait


def _nothing() -> None:
    pass
