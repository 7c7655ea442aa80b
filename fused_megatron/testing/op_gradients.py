"""An op and all its gradients at once, compared with what torch makes of the same inputs in float64."""

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch

from fused_megatron.testing.tolerances import assert_close_to_reference

# One output or several; None among them is left out.
Op = Callable[..., torch.Tensor | Sequence[torch.Tensor | None]]
Inputs = Sequence[torch.Tensor | None]
Upstream = torch.Tensor | Sequence[torch.Tensor]


def outputs_of(op: Op, inputs: Inputs) -> list[torch.Tensor]:
    """The outputs of op(*inputs) as a list."""
    outputs = op(*inputs)
    return [outputs] if isinstance(outputs, torch.Tensor) else [y for y in outputs if y is not None]


def output_and_gradients(op: Op, inputs: Inputs, dy: Upstream) -> list[torch.Tensor]:
    """[every output, the gradient of every input of a floating-point dtype], for the upstream gradients dy.

    Fewer dy than outputs: the last outputs have no upstream gradient.
    """
    leaves = [t.detach().requires_grad_() if is_leaf(t) else t for t in inputs]
    outputs = outputs_of(op, leaves)
    upstream = as_list(dy)
    wanted = [t for t in leaves if is_leaf(t)]
    return [*outputs, *torch.autograd.grad(outputs[: len(upstream)], wanted, upstream)]


def is_leaf(tensor: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether an input has a gradient: indices, masks and states have none."""
    return tensor is not None and tensor.is_floating_point()


def as_list(dy: Upstream) -> list[torch.Tensor]:
    """The upstream gradients as a list."""
    return [dy] if isinstance(dy, torch.Tensor) else list(dy)


def assert_op_matches(
    op: Op, torch_op: Op, inputs: Inputs, dy: Upstream, *, yardstick: torch.dtype | None = torch.float32
) -> list[torch.Tensor]:
    """Assert that outputs and gradients of op err at most twice as much as those of torch_op, and have right dtypes.

    The measure is torch_op in float64; the yardstick torch_op in the dtype `yardstick`, rounded to the dtypes of op's
    results.

    Args:
        op: what is tested.
        torch_op: the same in plain torch, for any floating-point dtype.
        inputs: of both; those of no floating-point dtype stay as they are, and have no gradient.
        dy: the upstream gradient of each output, in the dtype of that output.
        yardstick: None for the dtypes of the inputs.

    Returns:
        What op computed: [every output, every gradient].
    """

    def in_dtype(dtype: torch.dtype) -> list[torch.Tensor]:
        wide = [t.to(dtype) if is_leaf(t) else t for t in inputs]
        return output_and_gradients(torch_op, wide, [t.to(dtype) for t in as_list(dy)])

    actual = output_and_gradients(op, inputs, dy)
    leaves = [t for t in inputs if is_leaf(t)]
    num_outputs = len(actual) - len(leaves)
    names = [f"output {i}" for i in range(num_outputs)] + [f"gradient {i}" for i in range(len(leaves))]
    # An output that has no upstream gradient is compared in the dtype that it has.
    dtypes = [t.dtype for t in as_list(dy)] + [t.dtype for t in actual[len(as_list(dy)) : num_outputs]]
    dtypes += [t.dtype for t in leaves]
    theirs = output_and_gradients(torch_op, inputs, dy) if yardstick is None else in_dtype(yardstick)
    for name, dtype, a, exact, other in zip(names, dtypes, actual, in_dtype(torch.float64), theirs, strict=True):
        assert a.dtype == dtype, f"{name}: {a.dtype}, wanted {dtype}"
        assert_close_to_reference(a, exact, other.to(dtype), name=name)
    return actual
