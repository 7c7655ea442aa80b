"""The gradient of a weight, straight into the fp32 buffer that the optimizer reads, where there is one."""

import torch


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, main_grad: torch.Tensor | None) -> torch.Tensor | None:
    """dy [T, O], x [T, I]: dy.T @ x [O, I]; with a main_grad that is added to it, and the result is None.

    A parameter's `main_grad` is a float32 tensor of its shape (training.GradientBuckets sets it). The product then
    accumulates into it in float32: no gradient of the parameter's size is made, rounded or added.
    """
    if main_grad is None:
        return dy.t() @ x
    if dy.dtype == main_grad.dtype:
        torch.addmm(main_grad, dy.t(), x, out=main_grad)
    elif dy.is_cuda:
        torch.addmm(main_grad, dy.t(), x, torch.float32, out=main_grad)
    else:  # the CPU's products of bfloat16 round their result to bfloat16
        torch.addmm(main_grad, dy.t().float(), x.float(), out=main_grad)
    return None
