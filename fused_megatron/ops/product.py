"""The matrix product that all layers use, forward and backward."""

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
    """Compute x [.., I] @ weight [O, I].T + bias [O]; equals torch.nn.functional.linear.

    Layers call no other matrix product (tests/ops/test_product.py), so that a low-precision recipe changes only this
    function. The three products of a linear layer:

        y  [.., O] = product(x, weight, bias)
        dx [.., I] = product(dy, weight.t())
        dw [O, I]  = product(dy.t(), x.t())         dy [T, O], x [T, I]

    Args:
        x: [.., I] float, any strides; a matrix [T, I] if `out` is given.
        weight: [O, I], dtype of x.
        bias: [O], dtype of x, or None; not together with `add`, nor with an `out` of another dtype.
        out: [T, O] memory for the result, dtype of x or float32; None: allocated.
        add: add the product to `out`.

    Returns:
        [.., O]; `out` if it is given. Autograd does not see a product with `out`: its callers are autograd functions.

    Memory: saves nothing. On a CPU an `out` of another dtype needs a temporary [T, O] in the dtype of x.
    Numerics: with 16-bit operands and a float32 `out`, a GPU sums and adds in float32; a CPU first rounds the product
        to the dtype of x (pass float32 operands to avoid that).
    """
    if out is None:
        assert not add, "there is nothing to add to"
        return F.linear(x, weight, bias)
    if bias is not None:
        assert not add and out.dtype == x.dtype
        return torch.addmm(bias, x, weight.t(), out=out)
    if out.dtype == x.dtype:
        return torch.addmm(out, x, weight.t(), out=out) if add else torch.mm(x, weight.t(), out=out)
    if x.device.type != "cpu" and out.dtype == torch.float32:
        if add:
            return torch.addmm(out, x, weight.t(), torch.float32, out=out)
        return torch.mm(x, weight.t(), torch.float32, out=out)
    rounded = torch.mm(x, weight.t())
    return out.add_(rounded) if add else out.copy_(rounded)
