"""Count of the bytes that a function moves, op by op: the saving of a fusion without measuring time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Ops that allocate memory without touching it.
_UNTOUCHED = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written by the ops of one call, and bytes of the tensors kept from forward for backward."""

    moved_bytes: int
    saved_bytes: int


def measure_traffic(step: Callable[[], object]) -> Traffic:
    """Run a forward and backward step and count its bytes: each op reads its tensors once and writes its results once.

    Views move nothing. A fused op counts as one op.
    """
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = _touched_bytes(tensor)
        return tensor

    with _Moved() as moved, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return Traffic(moved.num_bytes, sum(saved.values()))


class _Moved(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and func.overloadpacket.__name__ not in _UNTOUCHED:
            self.num_bytes += sum(_touched_bytes(t) for t in _tensors((args, kwargs)))
            self.num_bytes += sum(_touched_bytes(t) for t in _tensors(results))
        return results


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _touched_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor; of an expanded tensor, the bytes of its memory."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())
