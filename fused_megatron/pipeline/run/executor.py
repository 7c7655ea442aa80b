"""The executor of pipeline schedules on real tensors, the same for every schedule."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import InputError, SharedInputError, first_line
from fused_megatron.collectives.groups import Group, group_rank
from fused_megatron.pipeline.run.action_loop import ActionLoop, StepInputs
from fused_megatron.pipeline.run.channels import Transport
from fused_megatron.pipeline.run.connections import Connections, default_device
from fused_megatron.pipeline.run.executor_checks import (
    checked_and_lowered,
    chosen_hooks,
    needs_gradients,
    stage_device,
    step_inputs,
)
from fused_megatron.pipeline.run.faults import PeerLost
from fused_megatron.pipeline.run.handshake import agree, tensor_hash
from fused_megatron.pipeline.run.messages import Messages
from fused_megatron.pipeline.run.stage_compute import StageCompute
from fused_megatron.pipeline.run.stage_hooks import StageHooks
from fused_megatron.pipeline.run.stashed_weights import StashedWeights
from fused_megatron.pipeline.run.step_table import shape_id
from fused_megatron.pipeline.run.tied_weights import TiedWeight
from fused_megatron.pipeline.schedule.action import SYNCHRONOUS, Action, Kind, Schedule
from fused_megatron.sharding import DeferredWeightGradients, update_record


class PipelineExecutor:
    """Runs one rank's part of a pipeline schedule, for any modules.

        schedule = build_schedule("1f1b", num_ranks=2, num_microbatches=4)
        stage = nn.Linear(8, 8) if rank == 0 else nn.Linear(8, 1)
        executor = PipelineExecutor(
            schedule, {rank: stage}, pp_group=mesh.pp_group,
            loss_fn=lambda y, target: (y - target).square().sum(),
        )
        optimizer = torch.optim.AdamW(stage.parameters())
        for x, target in batches:                          # x [32, 8], target [32, 1]; the same on both ranks
            optimizer.zero_grad()
            loss = executor.step(x.chunk(4), target.chunk(4), loss_divisor=target.numel())
            optimizer.step()                               # the loss is there on every rank
        executor.close()

    Gradients add up in the main_grad of a parameter's record (sharding.parameter_record) where it has one and the
    layer that uses it knows it, as our linears do, else in `param.grad`. Zeroing, clipping and the optimizer are the
    caller's. Microbatches may differ in shape.

    Args:
        schedule: of compute actions (it is lowered here), or lowered.
        stages: this rank's modules by stage, on their device. A stage is called with the tensors that the stage before
            returned (a tensor or a tuple of tensors), stage 0 with a microbatch's inputs.
        pp_group: the ranks of the pipeline; rank r of the schedule is its rank r. None for one rank.
        loss_fn: (output of the last stage, target) -> the **sum** of the microbatch's losses, 0-dim. Needed on the rank
            of the last stage.
        tied: for each group of schedule.tied this rank's parameters by stage. Their initial values must be equal. Two
            stages of one rank may share one parameter.
        hooks: what happens to a stage when the schedule says so: `reduce` its gradients over data-parallel ranks,
            `unshard` and `reshard` its weights, `update` it (asynchronous schedules must have one). See stage_hooks.py.
        reduce_gradients, update: in place of `hooks`: its `reduce` and `update` only.
        transport: another network than NCCL or gloo (tests).
        lookahead: how many computations ahead of its use a receive is posted.
        timeout_s: of a wait.
        auxiliary_losses: stages that are not the last may return modules.auxiliary_loss.WithAuxiliaryLoss in training;
            the same on all ranks. Such a loss is added to the microbatch's, divided with it, and learned from.
        observe: called with (action, start, end) in seconds, as time.perf_counter, after each computation.

    Raises:
        InputError: on every rank, before any stage runs: a schedule with a fault, other stages than it places here,
            no loss_fn on the last rank, an asynchronous schedule without update or with sharded weights, schedules or
            tied weights that differ between ranks.

    Communication: at the start a hash of all that must agree, and one connection for each pair of ranks and direction.
        A step: the tensors between stages; one all-reduce of 8 bytes a microbatch before it, and one broadcast of as
        many after it; with auxiliary_losses one more all-reduce of as many. Where a stage sees an input of new shapes,
        1 KiB a connection forward, and 8 bytes backward, once.
    Memory: a copy of an output, which is freed when its receiver has taken it, and the buffers of a receive are those
        of its microbatch only. Live activations as `peak_live_activations`, and one received tensor more.
    Numerics: synchronous schedules add the gradients of a stage in the order of the microbatches: to the last bit those
        of one process that does the same. A tied weight's are added up for each stage, and the sums once at the end.
        A parameter that two stages of a rank share is added to in the order of the schedule.

    Papers: docs/schedules.md names that of each schedule; the split of a backward: Qi et al. 2023 (arXiv:2401.10241).
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, nn.Module],
        *,
        pp_group: Group,
        loss_fn: Callable[[Any, Any], torch.Tensor] | None,
        tied: Sequence[Mapping[int, nn.Parameter]] = (),
        hooks: StageHooks | None = None,
        reduce_gradients: Callable[[int], Callable[[], None] | None] | None = None,
        update: Callable[[int, int], None] | None = None,
        transport: Transport | None = None,
        lookahead: int = 1,
        timeout_s: float = 1800.0,
        auxiliary_losses: bool = False,
        observe: Callable[[Action, float, float], None] | None = None,
    ) -> None:
        self._rank = group_rank(pp_group)
        lowered, error = None, None
        try:
            hooks = chosen_hooks(hooks, reduce_gradients, update)
            lowered = checked_and_lowered(schedule, stages, pp_group, loss_fn, tied, hooks)
        except InputError as wrong:
            error = wrong
        hashes = [[tensor_hash(weight) for weight in group.values()] for group in tied]
        name = agree(pp_group, error, lowered, hashes, auxiliary_losses)
        assert lowered is not None and hooks is not None
        self._auxiliary_losses = auxiliary_losses
        self.schedule = lowered
        device = next(filter(None, map(stage_device, stages.values())), None) or default_device(pp_group)
        self._connections = Connections(name, lowered, pp_group, device, transport, timedelta(seconds=timeout_s))
        deferred = DeferredWeightGradients()
        last = lowered.num_stages - 1
        self._stages = {
            stage: StageCompute(module, deferred, loss_fn if stage == last else None, auxiliary_losses)
            for stage, module in stages.items()
        }
        if any(action.kind == Kind.WEIGHT_GRAD for action in lowered.actions[self._rank]):
            for module in stages.values():
                for parameter in module.parameters():
                    update_record(parameter, deferred=deferred)
        stashed = {}
        if lowered.weights != SYNCHRONOUS:
            stashed = {stage: StashedWeights(module, stage, lowered) for stage, module in stages.items()}
        self._loop = ActionLoop(
            lowered,
            self._rank,
            self._stages,
            stashed,
            [TiedWeight(weights, *group) for weights, group in zip(tied, self._connections.tied_groups, strict=True)],
            Messages(lowered, self._connections.transport, device, self._connections.global_ranks),
            hooks,
            observe,
            lookahead,
        )
        self.microbatch_losses = torch.zeros(0, dtype=torch.float64)
        """Of the last step or evaluation: the loss sum of each microbatch, on every rank."""

    @property
    def at(self) -> Action | None:
        """The action that this rank is at; None between steps."""
        return self._loop.at

    @property
    def num_live(self) -> int:
        """Microbatches of stages whose forward is done and whose backward is not."""
        return sum(stage.num_live for stage in self._stages.values())

    def step(
        self,
        inputs: Sequence[Any] | None = None,
        targets: Sequence[Any] | None = None,
        *,
        loss_divisor: float,
        stage_kwargs: Sequence[Mapping[str, Any]] | None = None,
    ) -> torch.Tensor:
        """Forward and backward of all microbatches.

        Args:
            inputs: on the rank of stage 0: for each microbatch a tensor, or a tuple of tensors. Elsewhere ignored.
            targets: on the rank of the last stage: for each microbatch what loss_fn takes. Elsewhere ignored.
            loss_divisor: the loss is the sum over the microbatches, divided by this: the number of tokens that count,
                of all data-parallel ranks. The gradient is divided with it, once.
            stage_kwargs: for each microbatch keyword arguments of every stage, the same on all ranks.

        Returns:
            The loss, 0-dim float64, on every rank. Where steps run into each other (asynchronous schedules) inputs and
            targets are those of all of them, loss_divisor is that of one, and the loss their sum.

        Raises:
            InputError: on every rank, before anything is sent: what one of them was given wrong; nothing to train.
            PipelineError: another rank failed, or is gone; says which, and where. The executor is of no use then.
        """
        with torch.enable_grad():
            return self._run(inputs, targets, loss_divisor, stage_kwargs, training=True)

    def evaluate(
        self,
        inputs: Sequence[Any] | None = None,
        targets: Sequence[Any] | None = None,
        *,
        loss_divisor: float = 1.0,
        stage_kwargs: Sequence[Mapping[str, Any]] | None = None,
    ) -> torch.Tensor:
        """Only the loss: the same schedule without its backwards. Arguments, result and errors as step()."""
        with torch.no_grad():
            return self._run(inputs, targets, loss_divisor, stage_kwargs, training=False)

    def close(self) -> None:
        """Cut the connections of this pipeline; the stages stay as they are."""
        self._loop.clear()
        self._connections.close()

    def _run(
        self,
        inputs: Sequence[Any] | None,
        targets: Sequence[Any] | None,
        loss_divisor: float,
        stage_kwargs: Sequence[Mapping[str, Any]] | None,
        training: bool,
    ) -> torch.Tensor:
        connections, loop = self._connections, self._loop
        for stage in self._stages.values():
            stage.auxiliary_losses.clear()
        if connections.closed:
            raise RuntimeError("this PipelineExecutor is closed, by close() or after a fault (make a new one)")
        try:
            step = self._begin(inputs, targets, loss_divisor, stage_kwargs, training)
            losses = loop.run(step, connections.table.shape_ids, training)
            count = len(self.schedule.microbatches)
            shared = connections.share_losses([losses[m] for m in range(count)] if losses else None, count)
            if training and self._auxiliary_losses:
                shared = connections.add_auxiliary_losses(shared, [s.auxiliary_losses for s in self._stages.values()])
        except SharedInputError:  # before anything was sent: the pipeline stays of use
            loop.clear()
            raise
        except PeerLost as lost:
            fault = connections.fault(lost.rank, lost, str(loop.at) if loop.at else None)
            self.close()
            raise fault from lost
        except BaseException as error:
            self._give_up(error)
            raise
        self.microbatch_losses = shared
        return shared.sum() / loss_divisor

    def _begin(
        self,
        inputs: Sequence[Any] | None,
        targets: Sequence[Any] | None,
        loss_divisor: float,
        stage_kwargs: Sequence[Mapping[str, Any]] | None,
        training: bool,
    ) -> StepInputs:
        """Check what was given, and tell the other ranks; they answer while the first stage computes."""
        step, error, ids = None, None, None
        try:
            device = self._connections.device
            step = step_inputs(self.schedule, self._rank, device, inputs, targets, loss_divisor, stage_kwargs)
        except InputError as wrong:
            error = wrong
        count = len(self.schedule.microbatches)
        if step is not None and 0 in self._stages:
            ids = [shape_id(step.inputs[m], step.kwargs[m] if step.kwargs else {}) for m in range(count)]
        table = self._connections.table
        trains = not training or step is None or needs_gradients(self._stages.values(), step)
        table.start(ids, count, error, trains)
        if step is None or not trains:
            table.shape_ids()
        assert step is not None
        return step

    def _give_up(self, error: BaseException) -> None:
        """This rank failed: say so to the others, and wake them."""
        action = self._loop.at
        self._connections.faults.write(self._rank, str(action) if action else None, first_line(error))
        self.close()
