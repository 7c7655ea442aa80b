"""A replica of a user's model that shares weights, gradients and optimizer state with other data-parallel ranks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fused_megatron.checks import InputError
from fused_megatron.collectives import group_size
from fused_megatron.collectives.together import sum_over_ranks_
from fused_megatron.data_parallel.placement import Placements
from fused_megatron.data_parallel.shared_state import share_state
from fused_megatron.data_parallel.weight_gather import WeightGather
from fused_megatron.data_parallel.weight_units import WeightUnit, weight_units
from fused_megatron.sharding import Replicas, expert_ranks, parallel_group, parameter_record, update_record

_FULL = "fm.full_state_dict(model) and fm.load_full_state_dict(model, state), on every rank"


class ShardedReplica:
    """Buckets and weights of a model in a user's own training loop.

    A backward fills the buckets. When it ends, they hold this rank's rows of the mean of the gradients over the
    data-parallel ranks, unless the backward ran inside no_sync(). A further backward without zero_() adds to the mean.
    Gradients of experts are sums over all ranks with the same experts, divided by the number of data-parallel ranks:
    the gradients of the same mean loss.

    Args:
        model: the module. All its parameters are on one device.
        placements: which tensors are sharded.
        replicas: of the parameters, with the rows that this rank owns.
        bucket_bytes: as GradientBuckets.
    """

    def __init__(self, model: nn.Module, placements: Placements, replicas: Replicas, bucket_bytes: float) -> None:
        self.parameters = dict(model.named_parameters())
        self.trainable = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self.replicas = replicas
        self.tp_group, self.experts = parallel_group(model), expert_ranks(model)
        self.keeps_rows_only = placements.weights
        self._is_sharded = placements.gradients
        self._dp_size = group_size(replicas.dense.group)
        self._buckets, self.weights = share_state({0: model}, placements, replicas, bucket_bytes, hides=True)
        if isinstance(self.weights, WeightGather):
            self._wait_in_forward(model, self.weights)
        else:
            self.weights.watch(model)
        self._own = {p: self._buckets[p] for p in self.trainable.values()}
        self.main: dict[nn.Parameter, nn.Parameter] = {}
        """The float32 rows that an optimizer updates; their `grad` is set when the mean is complete."""
        self._syncs = True
        self._is_whole = False
        self._inside = False  # whether a backward is running
        self._has_begun = False  # whether its first gradient has arrived
        self._reached: set[nn.Parameter] = set()  # parameters with a gradient in this backward
        self._used: set[nn.Parameter] = set()  # parameters with a gradient since zero_()
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
        """Round changed main rows into the weights, and send them to the other ranks."""
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
        """Copy values that were written into whole parameters to this rank's rows; call it inside whole()."""
        with torch.no_grad():
            for parameter in self.parameters.values():
                if self.keeps_rows_only:
                    self.own(parameter).copy_(self.replicas.rows.of(parameter).own(parameter.detach()))
                if parameter in self.main and parameter.dtype != self.main[parameter].dtype:
                    self.main[parameter].copy_(self.own(parameter))

    def before_state_dict(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Wait for weights that are being gathered; raise if this rank has only its rows of the weights."""
        if keep_vars:  # the caller wants the parameters, not their values
            return
        if self.keeps_rows_only and not self._is_whole:
            raise InputError(f"state_dict with zero_stage=3: a rank has only its rows of the weights ({_FULL})")
        self.weights.finish()

    def before_load(self, model: nn.Module, state: Any, prefix: str, metadata: Any, *_: Any) -> None:
        """Raise if load_state_dict would replace parameters; then as before_state_dict."""
        if metadata.get("assign_to_params_buffers"):
            raise InputError(f"load_state_dict(assign=True) would replace parameters that ranks share ({_FULL})")
        self.before_state_dict(model, prefix, keep_vars=False)

    def after_load(self, *_: Any) -> None:
        """Copy loaded weights to this rank's rows."""
        self.take_over()

    def _wait_in_forward(self, model: nn.Module, gather: WeightGather) -> None:
        """Make every unit's forward wait for its weights, and the model's forward for units that it does not call.

        A model may read the weights of a module whose forward it never calls: torch's attention reads the weight of its
        output projection.
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
        """Leave gradients incomplete after the backwards in this context; the next backward outside completes them."""
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
        """Complete the mean of the gradients, unless it is complete. Every rank must call it.

        Communication: as GradientBuckets; one all-reduce of 4 bytes a parameter tensor over the data-parallel ranks.
        """
        if self._is_mean or not self._used:
            return
        self._buckets.reduce()()
        self._buckets.finish_reduced()
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
        """Return this rank's rows of the mean gradient of every parameter that some rank used in the step."""
        self.settle()
        return {p: self._own[p] for p in self._own if p in self._used}

    def _used_anywhere(self) -> set[nn.Parameter]:
        """Return the parameters that some rank used. An optimizer leaves other parameters as they are."""
        counts = []
        for replicas, parameters in self.replicas.split(self.trainable):
            members, device = list(parameters.values()), next(iter(self._own)).device
            used = torch.tensor([p in self._used for p in members], dtype=torch.int32, device=device)
            sum_over_ranks_(used, replicas.group)
            counts.append((members, used))
        if len(self._used) == len(self._own):  # the sums cannot change the result: do not wait for the device
            return self._used
        return {p for members, used in counts for p, count in zip(members, used.tolist(), strict=True) if count}

    def _notice(self, parameter: nn.Parameter) -> Any:
        """Install hooks that run before a layer or autograd adds a gradient of the parameter."""
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
        """Note that autograd adds a gradient to a parameter."""
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
        """Hook the outputs to notice the start of a backward: without it a checkpoint inside looks like a backward."""
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
        if not self._has_begun:  # torch.autograd.grad adds no gradient to a parameter
            return
        self._used |= self._reached
        if self._syncs:
            self.settle()
        elif self._is_sharded:
            self._buckets.reduce()  # the sums arrive during the next forward
