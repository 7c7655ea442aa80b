"""The matrix product of a layer: one function for every product, forward and backward."""

import torch
import torch.nn.functional as F


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    add: bool = False,
) -> torch.Tensor:
    """x [.., I] @ weight [O, I].T + bias [O]; equals torch.nn.functional.linear.

    Layers call no other matrix product (tests/ops/test_product.py), so that a low-precision recipe has one place to
    change. The three products of a linear layer:

        y  [.., O] = product(x, weight, bias)
        dx [.., I] = product(dy, weight.t())
        dw [O, I]  = product(dy.t(), x.t())         dy [T, O], x [T, I]

    Args:
        x: [.., I] float, rows of any strides; a matrix [T, I] where `out` is given.
        weight: [O, I], dtype of x.
        bias: [O], dtype of x, or None; not with add or another dtype of out.
        out: [T, O] memory for the result, dtype of x or float32; None makes it.
        add: add the product to what `out` holds.

    Returns:
        [.., O]; `out` where it is given. Without autograd: callers are autograd functions, or give no `out`.

    Memory: nothing saved. On a CPU an `out` of another dtype costs a product in the dtype of x beside it.
    Numerics: a float32 `out` of 16-bit operands is summed in float32 on a GPU; on a CPU the product is rounded to the
        dtype of x before it goes there (pass operands in float32 where that is not wanted).
    """
    if out is None:
        assert not add, "there is nothing to add to"
        return F.linear(x, weight, bias)
    if bias is not None:
        assert not add and out.dtype == x.dtype
        return torch.addmm(bias, x, weight.t(), out=out)
    if out.dtype == x.dtype:
        return torch.addmm(out, x, weight.t(), out=out) if add else torch.mm(x, weight.t(), out=out)
    if x.is_cuda and out.dtype == torch.float32:
        if add:
            return torch.addmm(out, x, weight.t(), torch.float32, out=out)
        return torch.mm(x, weight.t(), torch.float32, out=out)
    rounded = torch.mm(x, weight.t())
    return out.add_(rounded) if add else out.copy_(rounded)
