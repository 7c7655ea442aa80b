"""RMSNorm between tensor-parallel layers; its gradient is complete under sequence parallelism, too."""

from typing import Any

import torch
import torch.distributed as dist

from fused_megatron import modules, ops
from fused_megatron.checks import InputError
from fused_megatron.collectives import group_size
from fused_megatron.sharding import copy_with_groups, used_by_parts


class SequenceParallelRMSNorm(modules.RMSNorm):
    """torch.nn.RMSNorm over the hidden dim; the weight is whole on every rank.

    Without sequence parallelism every rank computes the same. With it each rank normalises its own block of the
    sequence, and backward sums the gradient of the weight over the ranks.

        x_shard_s   [S / R, B, H] to the same shape
        backward    dweight [H] = sum over ranks and rows of dy * n

    Args:
        hidden_size: H.
        eps: added to the mean square; None for the default of ops.rms_norm.
        tp_group: the R ranks; None for this rank only.
        sequence_parallel: the input is this rank's block of the sequence.
        device, dtype: as torch.nn.RMSNorm.

    Communication: none forward; under sequence parallelism one all-reduce of 4 H bytes backward, or
        the sum of the buckets once a step (sharding.used_by_parts).
    Memory: as ops.rms_norm.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float | None = 1e-5,
        *,
        tp_group: dist.ProcessGroup | None,
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps=eps, device=device, dtype=dtype)
        self.tp_group = tp_group
        self.sequence_parallel = sequence_parallel and group_size(tp_group) > 1

    def forward(self, x: torch.Tensor, *, residual: torch.Tensor | None = None, return_total: bool = False) -> Any:
        """Normalise x [..., H], or x + residual; returns the same shape and dtype, or (y, total) as ops.rms_norm.

        Raises:
            InputError: the last dim is not H.
        """
        if x.shape[-1:] != self.normalized_shape:
            raise InputError(f"x.shape={tuple(x.shape)} must end in hidden_size={self.normalized_shape[0]}")
        weight: torch.Tensor = self.weight
        if self.sequence_parallel:
            (weight,) = used_by_parts((weight,), self.tp_group)
        return ops.rms_norm(x, weight, self.eps, residual=residual, return_total=return_total)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy_with_groups(self, (self.tp_group,), memo)
