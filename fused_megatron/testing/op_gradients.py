"""Comparison of an op's outputs and gradients with the same function of torch in float64."""

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch

from fused_megatron.testing.tolerances import assert_close_to_reference

# One or several outputs; None is ignored.
Op = Callable[..., torch.Tensor | Sequence[torch.Tensor | None]]
Inputs = Sequence[torch.Tensor | None]
Upstream = torch.Tensor | Sequence[torch.Tensor]


def outputs_of(op: Op, inputs: Inputs) -> list[torch.Tensor]:
    """Return the outputs of op(*inputs) as a list."""
    outputs = op(*inputs)
    return [outputs] if isinstance(outputs, torch.Tensor) else [y for y in outputs if y is not None]


def output_and_gradients(op: Op, inputs: Inputs, dy: Upstream) -> list[torch.Tensor]:
    """Return [every output, the gradient of every floating-point input] for the upstream gradients dy.

    If there are fewer dy than outputs, the last outputs have no upstream gradient.
    """
    leaves = [t.detach().requires_grad_() if is_leaf(t) else t for t in inputs]
    outputs = outputs_of(op, leaves)
    upstream = as_list(dy)
    wanted = [t for t in leaves if is_leaf(t)]
    return [*outputs, *torch.autograd.grad(outputs[: len(upstream)], wanted, upstream)]


def is_leaf(tensor: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Return whether an input has a gradient: indices, masks and states have none."""
    return tensor is not None and tensor.is_floating_point()


def as_list(dy: Upstream) -> list[torch.Tensor]:
    """Return the upstream gradients as a list."""
    return [dy] if isinstance(dy, torch.Tensor) else list(dy)


def assert_op_matches(
    op: Op, torch_op: Op, inputs: Inputs, dy: Upstream, *, yardstick: torch.dtype | None = torch.float32
) -> list[torch.Tensor]:
    """Assert that op's outputs and gradients have at most twice the error of torch_op's, and the right dtypes.

    Errors are measured against torch_op in float64. The error of torch_op is measured in the dtype `yardstick`, after
    rounding to the dtypes of op's results.

    Args:
        op: the op under test.
        torch_op: the same function in plain torch, for any floating-point dtype.
        inputs: for both; inputs that are not floating point are not converted and have no gradient.
        dy: the upstream gradient of each output, in the dtype of that output.
        yardstick: None: the dtypes of the inputs.

    Returns:
        The results of op: [every output, every gradient].
    """

    def in_dtype(dtype: torch.dtype) -> list[torch.Tensor]:
        wide = [t.to(dtype) if is_leaf(t) else t for t in inputs]
        return output_and_gradients(torch_op, wide, [t.to(dtype) for t in as_list(dy)])

    actual = output_and_gradients(op, inputs, dy)
    leaves = [t for t in inputs if is_leaf(t)]
    num_outputs = len(actual) - len(leaves)
    names = [f"output {i}" for i in range(num_outputs)] + [f"gradient {i}" for i in range(len(leaves))]
    # An output without an upstream gradient may have any dtype.
    dtypes = [t.dtype for t in as_list(dy)] + [t.dtype for t in actual[len(as_list(dy)) : num_outputs]]
    dtypes += [t.dtype for t in leaves]
    theirs = output_and_gradients(torch_op, inputs, dy) if yardstick is None else in_dtype(yardstick)
    for name, dtype, a, exact, other in zip(names, dtypes, actual, in_dtype(torch.float64), theirs, strict=True):
        assert a.dtype == dtype, f"{name}: {a.dtype}, wanted {dtype}"
        assert_close_to_reference(a, exact, other.to(dtype), name=name)
    return actual
