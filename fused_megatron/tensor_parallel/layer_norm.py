"""LayerNorm between tensor-parallel layers; its gradients are complete under sequence parallelism, too."""

from typing import Any

import torch
import torch.distributed as dist

from fused_megatron import modules, ops
from fused_megatron.checks import InputError
from fused_megatron.collectives import group_size
from fused_megatron.sharding import copy_with_groups, used_by_parts


class SequenceParallelLayerNorm(modules.LayerNorm):
    """torch.nn.LayerNorm over the hidden dim; weight and bias are whole on every rank.

    Without sequence parallelism every rank computes the same. With it each rank normalises its own block of the
    sequence, and backward sums the gradients of weight and bias over the ranks.

        x_shard_s   [S / R, B, H] to the same shape
        backward    dweight [H] = sum over ranks and rows of dy * n;  dbias [H] = sum over ranks and rows of dy

    Args:
        hidden_size: H.
        eps: added to the variance.
        bias: whether the layer has a bias.
        tp_group: the R ranks; None for this rank only.
        sequence_parallel: the input is this rank's block of the sequence.
        device, dtype: as torch.nn.LayerNorm.

    Communication: none forward; under sequence parallelism one all-reduce of 8 H bytes backward, or
        the sum of the buckets once a step (sharding.used_by_parts).
    Memory: as ops.layer_norm.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        bias: bool = True,
        *,
        tp_group: dist.ProcessGroup | None,
        sequence_parallel: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps=eps, bias=bias, device=device, dtype=dtype)
        self.tp_group = tp_group
        self.sequence_parallel = sequence_parallel and group_size(tp_group) > 1

    def forward(self, input: torch.Tensor, *, residual: torch.Tensor | None = None, return_total: bool = False) -> Any:
        """Normalise [..., H], or input + residual; returns the same shape and dtype, or (y, total) as ops.layer_norm.

        Raises:
            InputError: the last dim is not H.
        """
        if input.shape[-1:] != self.normalized_shape:
            raise InputError(f"input.shape={tuple(input.shape)} must end in hidden_size={self.normalized_shape[0]}")
        weight: torch.Tensor = self.weight
        bias: torch.Tensor | None = self.bias
        if self.sequence_parallel:
            weight, *biases = used_by_parts(tuple(p for p in (weight, bias) if p is not None), self.tp_group)
            bias = biases[0] if biases else None
        return ops.layer_norm(input, weight, bias, self.eps, residual=residual, return_total=return_total)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy_with_groups(self, (self.tp_group,), memo)
