"""A replica of a user's model that shares weights, gradients and optimizer state with other data-parallel ranks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fused_megatron.checks import InputError
from fused_megatron.collectives import Group
from fused_megatron.collectives.together import sum_over_ranks_
from fused_megatron.data_parallel.placement import Placements
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.data_parallel.sharded_weights import ShardedWeights
from fused_megatron.data_parallel.weight_gather import WeightGather
from fused_megatron.data_parallel.weight_units import WeightUnit, weight_units
from fused_megatron.mesh import SubMesh
from fused_megatron.sharding import WHOLE_ROWS, RowShards, parallel_group, parameter_record, update_record

_FULL = "fm.full_state_dict(model) and fm.load_full_state_dict(model, state), on every rank"


class ShardedReplica:
    """Buckets and weights of a model in a user's own training loop.

    A backward fills the buckets; when it ends, they hold this rank's rows of the mean of the gradients over the
    data-parallel ranks. Inside no_sync() they do not yet. A backward after the mean, without zero_() between them, adds
    to the mean.

    Args:
        model: the module. All its parameters are on one device.
        placements: what is sharded.
        shards: this rank among the ranks that share the rows of each parameter.
        copies: this rank among the ranks that own the same rows.
        dp_group: both together.
        bucket_bytes: as GradientBuckets.
    """

    def __init__(
        self,
        model: nn.Module,
        placements: Placements,
        shards: SubMesh,
        copies: SubMesh,
        dp_group: Group,
        bucket_bytes: float,
    ) -> None:
        self.parameters = dict(model.named_parameters())
        self.trainable = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self.rows = RowShards(shards.size, shards.rank) if shards.size > 1 else WHOLE_ROWS
        self.group, self.tp_group = shards.group, parallel_group(model)
        self.keeps_rows_only = placements.weights
        self._is_sharded = placements.gradients
        self._dp_group, self._dp_size = dp_group, shards.size * copies.size
        self._buckets = GradientBuckets(
            list(self.trainable.values()),
            shards.group if shards.size > 1 else dp_group,
            bucket_bytes,
            self.rows,
            copies.group if shards.size > 1 else None,
            placements.gradients,
        )
        self.weights: WeightGather | ShardedWeights
        if placements.weights:
            self.weights = ShardedWeights({0: model}, self.rows, shards.group)
            self.weights.watch(model)
        else:
            self.weights = WeightGather(self._buckets.in_order_of_forward(), self.rows, shards.group, hides=True)
            self._wait_in_forward(model, self.weights)
        self._own = {p: self._buckets[p] for p in self.trainable.values()}
        self.main: dict[nn.Parameter, nn.Parameter] = {}
        """The float32 rows that an optimizer updates; their `grad` is set when the mean is known."""
        self._syncs = True
        self._is_whole = False
        self._inside = self._has_begun = False  # a backward, and its first gradient
        self._reached: set[nn.Parameter] = set()  # in this backward
        self._used: set[nn.Parameter] = set()  # since zero_()
        self._is_mean = False
        self._carried: list[torch.Tensor] = []
        self._nodes = [self._notice(parameter) for parameter in self._own]
        model.register_forward_pre_hook(self._before_forward, prepend=True)
        model.register_forward_hook(self._after_forward)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError(f"a model after shard_data_parallel cannot be copied or pickled ({_FULL})")

    # Weights

    def own(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return this rank's rows of a parameter, a view of the weights. Call updated() after a change."""
        return self.weights.own(parameter)

    def updated(self) -> None:
        """Round changed main rows to the weights, and send them to the other ranks."""
        low = [(self.own(p), main.detach()) for p, main in self.main.items() if p.dtype != main.dtype]
        if low:
            torch._foreach_copy_([own for own, _ in low], [main for _, main in low])
        self.weights.start()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Make all parameters whole while the context is open. Every rank must enter it."""
        with self.weights.whole():
            self._is_whole = True
            try:
                yield
            finally:
                self._is_whole = False

    def take_over(self) -> None:
        """Take values that were written into whole parameters, inside whole()."""
        with torch.no_grad():
            for parameter in self.parameters.values():
                if self.keeps_rows_only:
                    self.own(parameter).copy_(self.rows.own(parameter.detach()))
                if parameter in self.main and parameter.dtype != self.main[parameter].dtype:
                    self.main[parameter].copy_(self.own(parameter))

    def before_state_dict(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Complete weights that are on their way; refuse weights of which this rank has rows only."""
        if keep_vars:  # the parameters, not their values
            return
        if self.keeps_rows_only and not self._is_whole:
            raise InputError(f"state_dict with zero_stage=3: a rank has only its rows of the weights ({_FULL})")
        self.weights.finish()

    def before_load(self, model: nn.Module, state: Any, prefix: str, metadata: Any, *_: Any) -> None:
        """Refuse what load_state_dict cannot do."""
        if metadata.get("assign_to_params_buffers"):
            raise InputError(f"load_state_dict(assign=True) would replace parameters that ranks share ({_FULL})")
        self.before_state_dict(model, prefix, keep_vars=False)

    def after_load(self, *_: Any) -> None:
        """Take loaded weights."""
        self.take_over()

    def _wait_in_forward(self, model: nn.Module, gather: WeightGather) -> None:
        """Make the forward of every unit wait for its weights, and the model's forward for units that it does not call.

        A model may read the weights of a module whose forward it never calls (attention of torch reads its output
        projection).
        """
        called: set[nn.Module] = set()

        def before_unit(unit: WeightUnit, *_: Any) -> None:
            called.add(unit.module)
            gather.wait_for(unit.parameters)

        units = list(weight_units(model))
        for unit in units:
            unit.module.register_forward_pre_hook(partial(before_unit, unit), prepend=True)

        def before_model(*_: Any) -> None:
            gather.wait_for([p for unit in units if unit.module not in called for p in unit.parameters])

        model.register_forward_pre_hook(before_model, prepend=True)

    # Gradients

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Do not complete the gradients of the backwards in this context; a backward after it does so."""
        before, self._syncs = self._syncs, False
        try:
            yield
        finally:
            self._syncs = before

    def zero_(self) -> None:
        """Begin a step: no parameter has a gradient."""
        self._buckets.zero_()
        self._used.clear()
        self._carried = []
        self._inside = self._is_mean = False
        for main in self.main.values():
            main.grad = None

    def settle(self) -> None:
        """Complete the mean of the gradients, if it is not complete. Every rank calls it.

        Communication: as GradientBuckets; one all-reduce of 4 bytes a parameter tensor over the data-parallel ranks.
        """
        if self._is_mean or not self._used:
            return
        self._buckets.reduce()()
        self._buckets.sum_copies()
        self._used = self._used_anywhere()
        rows = [self._own[p] for p in self._own if self._own[p].numel()]
        if self._dp_size > 1 and rows:
            torch._foreach_div_(rows, self._dp_size)
        if self._carried:
            torch._foreach_add_(list(self._own.values()), self._carried)
            self._carried = []
        self._is_mean = True
        for parameter, main in self.main.items():
            main.grad = self._own[parameter] if parameter in self._used else None

    def gradients(self) -> Mapping[nn.Parameter, torch.Tensor]:
        """Return the mean of the gradients of this rank's rows, of the parameters that the step used on any rank."""
        self.settle()
        return {p: self._own[p] for p in self._own if p in self._used}

    def _used_anywhere(self) -> set[nn.Parameter]:
        """Return the parameters that some rank used. An optimizer leaves other parameters as they are."""
        if self._dp_group is None:
            return self._used
        device = next(iter(self._own)).device
        used = torch.tensor([p in self._used for p in self._own], dtype=torch.int32, device=device)
        sum_over_ranks_(used, self._dp_group)
        if len(self._used) == len(self._own):  # so the host need not wait for a device
            return self._used
        return {p for p, count in zip(self._own, used.tolist(), strict=True) if count}

    def _notice(self, parameter: nn.Parameter) -> Any:
        """Install calls of _reach before a gradient of the parameter is added, by autograd or by a layer."""
        main_grad = parameter_record(parameter).main_grad
        assert main_grad is not None
        update_record(parameter, main_grad=partial(self._main_grad, main_grad))
        node = torch.autograd.graph.get_gradient_edge(parameter).node
        node.register_prehook(partial(self._reach, parameter))
        return node

    def _main_grad(self, total: Callable[[], torch.Tensor]) -> torch.Tensor:
        self._begin()
        return total()

    def _reach(self, parameter: nn.Parameter, *_: Any) -> None:
        """Count a gradient that autograd adds to a parameter."""
        self._begin()
        if parameter in self._reached and (self._syncs or self._is_sharded):
            name = next(name for name, p in self.trainable.items() if p is parameter)
            raise InputError(
                f"{name} got two gradients in one backward, the first of which may be on its way to other ranks "
                "(torch.utils.checkpoint with use_reentrant=False gives one)"
            )
        self._reached.add(parameter)

    def _before_forward(self, *_: Any) -> None:
        if torch._C._current_graph_task_id() < 0:  # a backward that failed did not end
            self._inside = False

    def _after_forward(self, model: nn.Module, arguments: Any, output: Any) -> None:
        """Begin a backward where it begins: a checkpoint inside it would otherwise seem to be a backward of its own."""
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() < 0:
            for x in tree_leaves(output):
                if isinstance(x, torch.Tensor) and x.requires_grad:
                    x.register_hook(self._enter)

    def _enter(self, *_: Any) -> None:
        if not self._inside:
            self._inside = True
            self._has_begun = False
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _begin(self) -> None:
        """Prepare the buckets for the first gradient of a backward."""
        self._enter()
        if self._has_begun:
            return
        self._has_begun = True
        self.weights.finish()  # a rank may not have used them all; they come before the sums on every rank
        self._reached.clear()
        if self._is_mean:
            self._carried = [own.clone() for own in self._own.values()]
            self._buckets.zero_()
            self._is_mean = False
        if self._syncs or self._is_sharded:
            self._buckets.reduce_after_backwards(1)

    def _end(self) -> None:
        self._inside = False
        if not self._has_begun:  # torch.autograd.grad adds to no parameter
            return
        self._used |= self._reached
        if self._syncs:
            self.settle()
        elif self._is_sharded:
            self._buckets.reduce()  # the sums arrive under the next forward
