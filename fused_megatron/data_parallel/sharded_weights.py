"""Weights that data-parallel ranks keep by rows, and gather around the use of each part of the model (ZeRO stage 3).

Papers: ZeRO (Rajbhandari et al., arXiv 1910.02054), stage 3; PyTorch FSDP (Zhao et al., arXiv 2304.11277).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fused_megatron.collectives import meet
from fused_megatron.data_parallel.row_blocks import RowBlocks, by_dtype
from fused_megatron.data_parallel.weight_units import WeightUnit, weight_units
from fused_megatron.observe.storages import RESIZE_STORAGE
from fused_megatron.sharding import Replicas, ReplicaSet

GATHERS_UNDER_WAY = 2


class ShardedWeights:
    """Keeps this rank's rows of every parameter, and makes parameters whole while the model needs them.

    Parameters stay the same objects with their whole shapes. Between uses they have no memory and read as NaN. own()
    returns this rank's rows; inside whole() parameters have their values.

    watch() gathers unit by unit: a unit is whole during its forward, and again during its backward. Meanwhile the next
    unit is gathered, in the order of the last forward or backward. Alternatively gather_stage() and release_stage()
    gather a whole stage.

    Args:
        stages: modules by index of the pipeline stage.
        replicas: of the parameters, with the rows that this rank keeps.

    Communication: one all-gather, in the dtype of the parameters, for each unit (weight_units.py) and forward, and one
        for each backward; another for the experts of a unit. An embedding is not gathered for backward.
    Memory: this rank's rows; one unit that is whole, and the next unit, which is being received.
    """

    def __init__(self, stages: Mapping[int, nn.Module], replicas: Replicas) -> None:
        for each in replicas.sets:
            meet(each.shard_group)  # the ranks connect now, and not in a forward
        self._units: dict[nn.Parameter, _Unit] = {}
        self._of_stage: dict[int, list[_Unit]] = {}
        for index, stage in stages.items():
            for unit in weight_units(stage):
                fresh = [p for p in dict.fromkeys(unit.parameters) if p not in self._units]
                if fresh:
                    made = _Unit(fresh, replicas)
                    self._units |= dict.fromkeys(fresh, made)
            self._of_stage[index] = self._units_of(stage.parameters())
        self._all = list(dict.fromkeys(self._units.values()))
        self._following: dict[tuple[bool, _Use], _Use] = {}  # the next use, by (whether in backward, use)
        self._latest: dict[bool, _Use | None] = {False: None, True: None}
        self._backward: list[_Call] = []  # calls whose backward has begun

    def own(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return this rank's rows of a parameter. Call start() after they have changed."""
        return self._units[parameter].own[parameter]

    def start(self) -> None:
        """Use changed rows: release whole parameters, whose values are old."""
        self._backward.clear()
        self._latest = {False: None, True: None}
        for unit in self._all:
            unit.users = 0
            unit.release()

    def finish(self) -> None:
        """Do nothing: no gather is under way after an update."""

    def watch(self, module: nn.Module) -> None:
        """Gather the weights of every unit of a stage around its forward and its backward."""
        module.register_forward_pre_hook(self._begin_forward, prepend=True)
        for unit in weight_units(module):
            use = _Use(self._units_of(unit.parameters), unit)
            if use.units:
                unit.module.register_forward_pre_hook(partial(self._before_forward, use), prepend=not unit.surrounds)
                unit.module.register_forward_hook(partial(self._after_forward, use))

    def using(self, parameters: Iterable[nn.Parameter], function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with these parameters whole during its call and its backward."""
        use = _Use(self._units_of(parameters), None)

        def call(*arguments: Any, **options: Any) -> Any:
            self._before_forward(use)
            result = function(*arguments, **options)
            self._after_forward(use, None, None, result)
            return result

        return call

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Make all parameters whole while the context is open. Every rank of the group must enter it."""
        units = self._all
        self._gather(units)()
        try:
            yield
        finally:
            for unit in units:
                unit.leave()

    def gather_stage(self, stage: int) -> Callable[[], None]:
        """Start to gather the parameters of a stage; the returned function waits for them."""
        return self._gather(self._of_stage[stage])

    def release_stage(self, stage: int) -> None:
        """Keep only this rank's rows of the parameters of a stage."""
        for unit in self._of_stage[stage]:
            unit.leave()

    def _gather(self, units: Sequence["_Unit"]) -> Callable[[], None]:
        for unit in units:
            unit.users += 1
        for unit in units[:GATHERS_UNDER_WAY]:
            unit.start()

        def wait() -> None:
            for index, unit in enumerate(units):
                unit.finish()
                for following in units[index + 1 : index + 1 + GATHERS_UNDER_WAY]:
                    following.start()

        return wait

    def _units_of(self, parameters: Iterable[nn.Parameter]) -> list["_Unit"]:
        return list(dict.fromkeys(self._units[p] for p in parameters if p in self._units))

    def _begin_forward(self, module: nn.Module, arguments: Any) -> None:
        if not self._backward:
            self._latest[False] = None

    def _make_whole(self, use: "_Use", backward: bool) -> None:
        """Wait for the units of a use, and start to gather the units that followed it the last time."""
        for unit in use.units:
            unit.finish()
        if not use.surrounds:
            before = self._latest[backward]
            if before is not None:
                self._following[backward, before] = use
            self._latest[backward] = use
            following = self._following.get((backward, use))
            for unit in following.units if following is not None else ():
                unit.start()

    def _before_forward(self, use: "_Use", *_: Any) -> None:
        if self._backward:  # recomputation in the block's backward, which has gathered its weights
            for unit in use.units:
                unit.finish()
            return
        for unit in use.units:
            unit.users += 1
        self._make_whole(use, backward=False)

    def _after_forward(self, use: "_Use", module: Any, arguments: Any, output: Any) -> None:
        if self._backward:
            return
        call = _Call(use)
        if torch.is_grad_enabled() and use.backward_reads:
            outputs = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor) and x.requires_grad]
            call.pending = len(outputs)
            for x in outputs:
                x.register_hook(partial(self._before_backward, call))
        if use.is_kept and call.pending:
            call.keeps = True
            return
        for unit in use.units:
            unit.leave()

    def _before_backward(self, call: "_Call", gradient: torch.Tensor) -> None:
        call.pending -= 1
        if not self._backward:
            self._latest[True] = None
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        if call not in self._backward:
            self._backward.append(call)
            if not call.keeps:
                for unit in call.use.units:
                    unit.users += 1
            if not call.use.surrounds:
                self._retire([c for c in self._backward if c is not call and not c.pending and not c.use.surrounds])
            self._make_whole(call.use, backward=True)

    def _end_backward(self) -> None:
        self._retire(list(self._backward))
        for unit in self._all:
            if not unit.users:  # gathered ahead and not used
                unit.release()

    def _retire(self, calls: Sequence["_Call"]) -> None:
        for call in calls:
            self._backward.remove(call)
            for unit in call.use.units:
                unit.leave()


class _Use:
    """The units that a module or a function needs at once."""

    def __init__(self, units: Sequence["_Unit"], of: WeightUnit | None) -> None:
        self.units = units
        self.surrounds = of is not None and of.surrounds
        self.backward_reads = of is None or of.backward_reads
        self.is_kept = of is None  # a function's backward follows at once, so its units stay whole


class _Call:
    """One forward of a use, until the end of its backward."""

    def __init__(self, use: _Use) -> None:
        self.use = use
        self.pending = 0
        """Number of outputs whose gradients have not arrived."""
        self.keeps = False
        """Whether the units have stayed whole since the forward."""


class _Unit:
    """Parameters that are gathered together."""

    def __init__(self, parameters: Sequence[nn.Parameter], replicas: Replicas) -> None:
        sets: dict[ReplicaSet, list[nn.Parameter]] = {}
        for parameter in parameters:
            sets.setdefault(replicas.of(parameter), []).append(parameter)
        self._parts = [_Part(part, each) for each, members in sets.items() for part in by_dtype(members)]
        self.own = {p: rows for part in self._parts for p, rows in part.own.items()}
        self.users = 0
        self._waits: list[Callable[[], None]] | None = None
        self._is_whole = False
        self.release()

    def start(self) -> None:
        """Start to gather the parameters, unless they are whole or being gathered."""
        if not self._is_whole and self._waits is None:
            self._waits = [part.start() for part in self._parts]

    def finish(self) -> None:
        """Wait until the parameters are whole."""
        self.start()
        for wait in self._waits or ():
            wait()
        self._waits, self._is_whole = None, True

    def leave(self) -> None:
        """End one use; release the parameters after the last use."""
        self.users -= 1
        if self.users <= 0:
            self.users = 0
            self.release()

    def release(self) -> None:
        """Free the memory of the parameters."""
        if self._waits is not None:
            self.finish()
        self._is_whole = False
        for part in self._parts:
            part.release()


class _Part:
    """Parameters of a unit with the same dtype and replicas, with a block [block_numel] of this rank's rows of each."""

    def __init__(self, parameters: Sequence[nn.Parameter], replicas: ReplicaSet) -> None:
        self._parameters, self._group, rows = parameters, replicas.shard_group, replicas.rows
        self._blocks = RowBlocks([p.shape for p in parameters], rows)
        first = parameters[0]
        self._block = torch.zeros(self._blocks.block_numel, dtype=first.dtype, device=first.device)
        self.own = dict(zip(parameters, self._blocks.own_rows(self._block), strict=True))
        # Gathered values go to the same memory each time: graphs refer to it between a forward and its backward.
        self._whole = []
        for parameter, own in self.own.items():
            own.copy_(rows.own(parameter.detach()))
            is_view = parameter.untyped_storage().nbytes() != parameter.numel() * parameter.element_size()
            self._whole.append(parameter.data.clone() if is_view else parameter.data)
        self._absent = first.new_full((), math.nan)

    def start(self) -> Callable[[], None]:
        receive = self._blocks.start_receive(self._block, self._group)

        def wait() -> None:
            gathered = receive()
            for whole in self._whole:
                _resize(whole, whole.numel() * whole.element_size())
            # `data` has a version counter of its own, so autograd does not see these writes as changes of a value.
            self._blocks.unpack(gathered, self._whole)
            for parameter, whole in zip(self._parameters, self._whole, strict=True):
                parameter.data = whole

        return wait

    def release(self) -> None:
        for index, parameter in enumerate(self._parameters):
            whole = self._whole[index]
            parameter.data = self._absent.expand(whole.shape)
            if whole.untyped_storage().resizable():
                _resize(whole, 0)
            else:  # another owner, such as numpy, holds this memory and frees it later
                self._whole[index] = torch.empty_like(whole)
                _resize(self._whole[index], 0)


def _resize(tensor: torch.Tensor, num_bytes: int) -> None:
    """Free or allocate the memory of a tensor, by an op that dispatch modes see."""
    RESIZE_STORAGE(tensor, num_bytes)
