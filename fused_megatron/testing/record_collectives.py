"""Count the collectives that really run, forward and backward."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What torch.distributed dispatches -> the word for it.
_NAMES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "broadcast_": "broadcast",
    "barrier": "barrier",
    "alltoall_base_": "all_to_all",
}

_PRODUCTS = {getattr(op, kind) for op in (torch.ops.aten.mm, torch.ops.aten.addmm) for kind in ("default", "out")}


class record_collectives(TorchDispatchMode):
    """Context manager that sees every collective of this thread where torch dispatches it.

    with record_collectives() as seen:
        loss = model(x).sum()
    assert seen.counts == {"all_reduce": 2}

    Attributes:
        counts: number of calls by kind ("all_reduce", "all_gather", "reduce_scatter", ..).
        elements: by kind, numbers that go in (for an all-gather: of this rank's shard).
        order: the kinds in the order of their start, with "mm" for each matrix product between them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()
        self.order: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            kind = _NAMES.get(name, name)
            self.counts[kind] += 1
            # An all-gather or reduce-scatter into one tensor has (output, input, ..), an all-reduce ([tensor], ..).
            source = args[1] if name.endswith("_base_") else args[0]
            self.elements[kind] += sum(x.numel() for x in _tensors(source))
            self.order.append(kind)
        elif func in _PRODUCTS:
            self.order.append("mm")
            self.at_product()
        return func(*args, **(kwargs or {}))

    def at_product(self) -> None:
        """Called before each matrix product; for tests that override it."""


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for item in value for x in _tensors(item)] if isinstance(value, list | tuple) else []
