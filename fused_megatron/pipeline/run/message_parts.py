"""Parts of a message that ranks with the same tensors share: each sends one part, and the receivers gather them.

Narayanan et al. 2021 (arXiv:2104.04473), section 4.1: without sequence parallelism all tensor-parallel ranks of a stage
hold the same activations, so that 1 / R of them from each rank is enough. The links between stages, which often leave
the node, carry 1 / R of the bytes; the gather runs between neighbours.
"""

from math import prod

import torch

from fused_megatron.collectives.groups import Group, group_rank, group_size
from fused_megatron.collectives.transfers import start_all_gather_blocks


class MessageParts:
    """Division of tensors over the ranks of a group that hold the same tensors.

    Rank r of R has elements r n to (r + 1) n of a flat tensor of N elements, with n = ceil(N / R); the last ranks may
    have fewer, or none.

    Args:
        group: the R ranks; None for this rank only, which has whole tensors.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._rank, self._ranks = group_rank(group), group_size(group)

    @property
    def place(self) -> tuple[int, int]:
        """The rank in the group and the number of ranks, which must be the same at both ends of a message."""
        return self._rank, self._ranks

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a contiguous tensor, as a flat view; on one rank the tensor."""
        if self._ranks == 1:
            return tensor
        return tensor.view(-1)[self._own(tensor.numel())]

    def new_buffer(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return memory for a part of a tensor, of the same size on every rank; on one rank for the tensor."""
        if self._ranks == 1:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty(-(-prod(shape) // self._ranks), dtype=dtype, device=device)

    def filled(self, buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the elements of a buffer that a message fills."""
        if self._ranks == 1:
            return buffer
        own = self._own(prod(shape))
        return buffer[: own.stop - own.start]

    def gather(self, buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the tensor whose parts the ranks have received; all ranks call it in the same order.

        Communication: one all-gather of the tensor; none on one rank.
        """
        if self._ranks == 1 or not buffer.numel():
            return buffer.view(shape) if self._ranks == 1 else buffer.new_empty(shape)
        whole = buffer.new_empty(self._ranks * buffer.numel())
        # As bytes, since the backends know fewer dtypes than a message may have.
        start_all_gather_blocks(buffer.view(torch.uint8), whole.view(torch.uint8), self._group).wait()
        return whole.resize_(shape)  # not a view, which a stage could not change in place

    def _own(self, numel: int) -> slice:
        size = -(-numel // self._ranks)
        return slice(min(numel, self._rank * size), min(numel, (self._rank + 1) * size))
