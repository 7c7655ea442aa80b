"""Communication ledger: the collectives that run in forward and backward, and their bytes."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

# Name of the c10d op -> kind of communication.
_NAMES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "broadcast_": "broadcast",
    "barrier": "barrier",
    "alltoall_base_": "all_to_all",
    "send": "send",
    "recv_": "receive",
}
_PRODUCTS = {getattr(op, kind) for op in (torch.ops.aten.mm, torch.ops.aten.addmm) for kind in ("default", "out")}


@dataclass(frozen=True)
class Communication:
    """One collective or message that this rank started.

    Attributes:
        kind: "all_reduce", "all_gather", "reduce_scatter", "broadcast", "send", ..
        elements, num_bytes: of the full tensor: the output of an all-gather, the input of every other collective.
        group: the global ranks of the group.
        layer: qualified name of the innermost running module in the outermost one; "" outside of modules.
        backward: whether it started during autograd's backward.
    """

    kind: str
    elements: int
    num_bytes: int
    group: tuple[int, ...]
    layer: str
    backward: bool


class Transfer(NamedTuple):
    """Kind, size and group of one op of torch.distributed.

    Attributes:
        kind, elements, num_bytes, group: as in Communication.
        source_elements: number of input elements (for an all-gather, of this rank's shard).
        dtype: dtype of the elements; None for a barrier.
    """

    kind: str
    elements: int
    num_bytes: int
    group: tuple[int, ...]
    source_elements: int
    dtype: torch.dtype | None


def transfer_of(name: str, args: Any) -> Transfer:
    """Return the transfer of an op of torch.distributed, by the op's name and arguments."""
    # args: (output, input, ..) for an all-gather or reduce-scatter of one tensor, ([tensor], ..) for an all-reduce.
    source = _tensors(args[1] if name.endswith("_base_") else args[0])
    kind = _NAMES.get(name, name)
    for x in source:  # over gloo our reduce-scatter is an all-to-all and a sum, and its tensor says so
        kind = getattr(x, "stands_for", kind)
    whole = _tensors(args[0]) if kind == "all_gather" else source
    return Transfer(
        kind,
        sum(x.numel() for x in whole),
        sum(x.numel() * x.element_size() for x in whole),
        _ranks(args),
        sum(x.numel() for x in source),
        source[0].dtype if source else None,
    )


class record_communication(TorchDispatchMode):
    """Context manager that records every collective that this thread dispatches, on real and fake process groups.

    with record_communication() as ledger:
        loss = model(x).sum()
    assert ledger.counts == {"all_reduce": 2}
    print(ledger.table())

    Attributes:
        entries: all collectives, in the order of their start.
        counts: number of calls by kind ("all_reduce", "all_gather", "reduce_scatter", ..).
        elements: by kind, number of input elements (for an all-gather, of this rank's shard).
        num_bytes: by kind, bytes of the full tensors.
        order: the kinds in the order of their start, with "mm" for each matrix product between them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Communication] = []
        self.counts: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self.order: list[str] = []
        self._modules = ModuleTracker()

    def __enter__(self) -> "record_communication":
        self._modules.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._modules.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._record(func.overloadpacket.__name__, args)
        elif func in _PRODUCTS:
            self.order.append("mm")
            self.at_product()
        return func(*args, **(kwargs or {}))

    def at_product(self) -> None:
        """Do nothing; called before each matrix product, so that tests can override it."""

    def _record(self, name: str, args: Any) -> None:
        found = transfer_of(name, args)
        self.counts[found.kind] += 1
        self.elements[found.kind] += found.source_elements
        self.num_bytes[found.kind] += found.num_bytes
        self.order.append(found.kind)
        layer = max(self._modules.parents - {"Global"}, key=lambda path: path.count("."), default="")
        self.entries.append(
            Communication(
                found.kind,
                found.elements,
                found.num_bytes,
                found.group,
                layer.partition(".")[2] or layer,
                self._modules.is_bw,
            )
        )

    def table(self) -> str:
        """Return calls and bytes by kind, group, direction and layer, as a Markdown table."""
        rows: dict[tuple[str, str, str, str], list[int]] = {}
        for entry in self.entries:
            direction = "backward" if entry.backward else "forward"
            key = (entry.layer, direction, entry.kind, ",".join(map(str, entry.group)))
            calls_and_bytes = rows.setdefault(key, [0, 0])
            calls_and_bytes[0] += 1
            calls_and_bytes[1] += entry.num_bytes
        lines = ["| layer | direction | collective | ranks | calls | bytes |", "|---|---|---|---|---|---|"]
        lines += [f"| {' | '.join(key)} | {calls} | {num_bytes:,} |" for key, (calls, num_bytes) in rows.items()]
        return "\n".join(lines)


def _ranks(args: Any) -> tuple[int, ...]:
    """Return the global ranks of the group in the arguments of a c10d op or of a shared-memory transfer."""
    for value in args:
        if isinstance(value, list) and value and all(isinstance(rank, int) for rank in value):
            return tuple(value)
        if isinstance(value, torch.ScriptObject):
            try:
                return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(value)))
            except (RuntimeError, TypeError, ValueError):  # not a process group, for example the reduction
                continue
    return ()


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for item in value for x in _tensors(item)] if isinstance(value, list | tuple) else []
