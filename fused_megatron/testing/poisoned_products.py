"""A check that no 16-bit matrix product reads a view with uninitialised memory between its rows."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty, _aten.new_empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty_strided}
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.addmm_, _aten.bmm, _aten.baddbmm}


class PoisonedProducts(TorchDispatchMode):
    """Fills new memory with NaN and fails if a 16-bit product reads a view with NaN between its rows.

    A CPU's matrix units read whole tiles, past the last column of a view, and multiply the rest by 0: a NaN there makes
    the result NaN. This check inspects the memory, not the result, so that it works on every CPU.

    Attributes:
        num_views: number of checked operands, which have memory between their rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _PRODUCTS:
            for operand in args:
                self._check_view(func, operand)
        if func.namespace == "fused_megatron":
            # Run our op's kernel with this mode active, so that the products inside it are checked too.
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _ALLOCATIONS and result.is_floating_point() and not result.is_meta:
            result.fill_(torch.nan)
        return result

    def _check_view(self, func: Any, operand: Any) -> None:
        if not isinstance(operand, torch.Tensor) or operand.dim() < 2 or operand.dtype.itemsize != 2:
            return
        matrix = operand if operand.stride(-1) == 1 else operand.transpose(-1, -2)
        rows, columns = matrix.shape[-2:]
        row_stride = matrix.stride(-2)
        if rows < 2 or matrix.stride(-1) != 1 or row_stride <= columns:
            return
        self.num_views += 1
        # The memory after the last row may be outside the storage.
        shape = (*matrix.shape[:-2], rows - 1, row_stride - columns)
        strides = matrix.stride()
        between = matrix.as_strided(shape, strides, matrix.storage_offset() + columns)
        assert between.isfinite().all(), (
            f"{func} reads a view {tuple(operand.shape)} with rows of {row_stride} elements, and NaN between them"
        )
