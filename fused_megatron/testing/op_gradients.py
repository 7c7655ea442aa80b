"""An op and all its gradients at once, compared with what torch makes of the same inputs in float64."""

from collections.abc import Callable, Sequence

import torch

from fused_megatron.testing.tolerances import assert_close_to_reference

Op = Callable[..., torch.Tensor]
Inputs = Sequence[torch.Tensor | None]


def output_and_gradients(op: Op, inputs: Inputs, dy: torch.Tensor) -> list[torch.Tensor]:
    """[y, the gradient of each input that is not None], for the upstream gradient dy."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = op(*leaves)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def assert_op_matches(op: Op, torch_op: Op, inputs: Inputs, dy: torch.Tensor) -> None:
    """Assert that output and gradients of op err at most twice as much as those of torch_op, and have right dtypes.

    The measure is torch_op in float64; the yardstick torch_op in float32, rounded to the dtypes of op's results.
    """

    def in_dtype(dtype: torch.dtype) -> list[torch.Tensor]:
        wide = [None if t is None else t.to(dtype) for t in inputs]
        return output_and_gradients(torch_op, wide, dy.to(dtype))

    actual = output_and_gradients(op, inputs, dy)
    names = ["y", *(f"gradient {i}" for i, t in enumerate(inputs) if t is not None)]
    dtypes = [dy.dtype, *(t.dtype for t in inputs if t is not None)]
    for name, dtype, a, exact, yardstick in zip(
        names, dtypes, actual, in_dtype(torch.float64), in_dtype(torch.float32), strict=True
    ):
        assert a.dtype == dtype, f"{name}: {a.dtype}, wanted {dtype}"
        assert_close_to_reference(a, exact, yardstick.to(dtype), name=name)
