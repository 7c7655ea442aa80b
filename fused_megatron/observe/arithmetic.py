"""Count of the floating-point operations of a torch function, op by op on the meta device, without computing."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Ops that only move, create or convert data count 0.
_FREE = {
    "_to_copy", "arange", "as_strided", "cat", "clone", "constant_pad_nd", "convert_element_type", "copy",
    "copy_", "detach", "embedding",
    "empty", "empty_like", "empty_permuted", "empty_strided", "expand", "fill", "fill_", "full", "full_like",
    "gather", "index", "index_put", "masked_fill", "new_empty", "new_empty_strided", "new_full", "new_ones",
    "new_zeros", "ones",
    "ones_like", "rand", "rand_like", "scalar_tensor", "scatter", "select_scatter", "slice_scatter", "triu", "tril",
    "where", "zero_", "zeros", "zeros_like",
}  # fmt: skip


def count_flops(function: Callable[..., Any], inputs: Sequence[Any]) -> int:
    """Count the floating-point operations of one forward and one backward pass, independent of fusion.

    A product of matrices [m, k] @ [k, n] counts 2 m k n. Every other op is decomposed into simple ops, and each counts
    the elements of its largest tensor: a sum of n elements counts n, an exp of n elements also n. Copies, conversions,
    look-ups and views count 0.
    """
    some = [_on_meta(value) for value in inputs]
    with _Counted() as counted:
        outputs = function(*some)
        outputs = tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
        wanted = [t for t in some if isinstance(t, torch.Tensor) and t.requires_grad]
        torch.autograd.grad(outputs, wanted, [torch.empty_like(t) for t in outputs])
    return counted.flops


def _on_meta(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_like(value, device="meta").requires_grad_(value.requires_grad)


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = flop_registry.get(func.overloadpacket)
        if product is None and func in decomposition_table:
            with self:
                result = decomposition_table[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if product is not None:
            self.flops += product(*args, **kwargs, out_val=result)
        elif not views and func.overloadpacket.__name__ not in _FREE:
            leaves = tree_leaves((args, kwargs, result))
            self.flops += max((t.numel() for t in leaves if isinstance(t, torch.Tensor)), default=0)
        return result
