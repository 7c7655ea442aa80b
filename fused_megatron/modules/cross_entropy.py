"""CrossEntropyLoss: a drop-in for torch.nn.CrossEntropyLoss."""

import torch
from torch.overrides import has_torch_function_unary

from fused_megatron import ops


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss on the fused op: same signature, defaults and state_dict.

    The arguments are the same as for torch.nn.CrossEntropyLoss: weight=None, size_average=None, ignore_index=-100,
    reduce=None, reduction="mean", label_smoothing=0.0. Class weights and probability targets have no fused kernel: for
    them this class calls torch's function.

    Communication, Memory, Numerics: as fused_megatron.ops.cross_entropy. The fused gradient cannot be differentiated
    again (except in float64).
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the loss of logits [C], [N, C] or [N, C, d1, ...] for class ids or probabilities.

        Args:
            input: float32, bfloat16, float16 or float64.
            target: [], [N] or [N, d1, ...] int64 class ids; or probabilities in the shape of input.

        Returns:
            A scalar, or the shape of the class ids for reduction="none".

        Raises:
            InputError: shapes that do not fit, or a target that is not a class (checked on the CPU only).
        """
        # Tensor subclasses may override torch's function.
        if has_torch_function_unary(input):
            return super().forward(input, target)
        if self.weight is not None or target.dtype != torch.int64 or not input.is_floating_point():
            return super().forward(input, target)
        return ops.cross_entropy(
            input,
            target,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
