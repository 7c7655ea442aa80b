"""AdamW in one pass over the bytes of the optimizer: one call for the lists of tensors of a parameter group."""

from collections.abc import Sequence

import torch

from fused_megatron.checks import InputError, check, check_same_device, check_shape, dtype_name
from fused_megatron.ops.registration import define_op
from fused_megatron.reference.adamw import adamw_ as reference

_update = define_op(
    "adamw_(Tensor(a!)[] main, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] gradient, Tensor(e!)[] low,"
    " Tensor gradient_scale, Tensor? skip, float lr, float beta1, float beta2, float eps, float weight_decay, int step,"
    " bool zero_gradient) -> ()",
    reference=reference,
    fake=lambda *_: None,
)


def adamw_(
    main: Sequence[torch.Tensor],
    exp_avg: Sequence[torch.Tensor],
    exp_avg_sq: Sequence[torch.Tensor],
    gradient: Sequence[torch.Tensor],
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    low: Sequence[torch.Tensor] = (),
    gradient_scale: torch.Tensor | float = 1.0,
    skip: torch.Tensor | None = None,
    zero_gradient: bool = False,
) -> None:
    """Update weights and moments in place: one step of torch.optim.AdamW, for all tensors of a parameter group.

        g = gradient * gradient_scale
        m = m + (g - m) (1 - beta1)                 v = v beta2 + (1 - beta2) g g
        w = w (1 - lr weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)

    Args:
        main: float32 weights w, contiguous, of any shapes.
        exp_avg, exp_avg_sq: float32 moments m and v, one for each weight, in its shape.
        gradient: float32, one for each weight, in its shape.
        step: number of this update, from 1 on.
        low: bfloat16 or float16 parameters that the main weights are rounded into; empty if there are none.
        gradient_scale: a number, or a float32 tensor of one element on the device of the weights (a clip coefficient
            that the host has not read).
        skip: a bool tensor of one element on the device of the weights; if it is True, nothing changes.
        zero_gradient: set the gradients to 0 in the same pass.

    Raises:
        InputError: lists of different lengths, shapes, dtypes or devices; step below 1.

    Memory: none beside its arguments. It reads 16 bytes per element and writes 12, 2 more for `low` and 4 more for
        zero_gradient.
    Numerics: every operation is rounded to float32 by itself, without fused multiply-adds: an element's result does
        not depend on its position in a tensor, nor on the processor. Within 1 ulp of torch's result (a few elements in
        ten thousand: 2 ulps).

    Paper: Decoupled Weight Decay Regularization (Loshchilov and Hutter, arXiv 1711.05101).
    """
    check(step >= 1, f"step={step} must be 1 or more")
    if not main:
        return
    lists = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "gradient": gradient, **({"low": low} if low else {})}
    for name, tensors in lists.items():
        check(len(tensors) == len(main), f"{name} has {len(tensors)} tensors, main has {len(main)}: one for each")
        for i, (tensor, weight) in enumerate(zip(tensors, main, strict=True)):
            check_shape(f"{name}[{i}]", tensor, tuple(weight.shape))
            check_same_device(f"{name}[{i}]", tensor, f"main[{i}]", weight)
    for name, tensors in {"main": main, **lists}.items():
        wanted = (torch.bfloat16, torch.float16) if name == "low" else (torch.float32,)
        for i, tensor in enumerate(tensors):
            if tensor.dtype not in wanted or not tensor.is_contiguous():
                raise InputError(
                    f"{name}[{i}] must be a contiguous tensor of {' or '.join(map(dtype_name, wanted))}, got "
                    f"{dtype_name(tensor.dtype)} with strides {tuple(tensor.stride())}"
                )
    if not isinstance(gradient_scale, torch.Tensor):
        gradient_scale = torch.full((), gradient_scale, dtype=torch.float32, device=main[0].device)
    inputs = (main, exp_avg, exp_avg_sq, gradient, low)
    _update(*inputs, gradient_scale, skip, lr, beta1, beta2, eps, weight_decay, step, zero_gradient)
