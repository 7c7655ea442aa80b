"""Executor of pipeline schedules on real tensors, the same for every schedule."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import InputError, SharedInputError, check, first_line
from fused_megatron.collectives.groups import Group, group_rank
from fused_megatron.pipeline.run.action_loop import ActionLoop, Around, StepInputs
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
from fused_megatron.pipeline.run.message_parts import MessageParts
from fused_megatron.pipeline.run.messages import Messages
from fused_megatron.pipeline.run.stage_compute import StageCompute
from fused_megatron.pipeline.run.stage_hooks import StageHooks
from fused_megatron.pipeline.run.stashed_weights import StashedWeights
from fused_megatron.pipeline.run.step_table import shape_id
from fused_megatron.pipeline.run.tied_weights import TiedWeight
from fused_megatron.pipeline.schedule.action import SYNCHRONOUS, Action, Kind, Schedule
from fused_megatron.pipeline.schedule.lowering import lower
from fused_megatron.pipeline.schedule.schedules import build_schedule
from fused_megatron.sharding import DeferredWeightGradients, update_record


class PipelineExecutor:
    """Executor of one rank's part of a pipeline schedule, for any modules.

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
            optimizer.step()                               # every rank has the loss
        executor.close()

    Gradients accumulate in the main_grad of a parameter's record (sharding.parameter_record), if it has one and the
    layer supports it, as the linear layers of this package do; else in `param.grad`. The caller zeroes and clips the
    gradients and runs the optimizer. Microbatches may differ in shape.

    Args:
        schedule: a schedule of compute actions (the executor lowers it), or a lowered one.
        stages: this rank's modules by stage, on their device. A stage is called with the result of the stage before (a
            tensor or a tuple of tensors), stage 0 with the inputs of a microbatch.
        pp_group: the ranks of the pipeline; rank r of the group is rank r of the schedule. None for one rank.
        loss_fn: (output of the last stage, target) -> the **sum** of the microbatch's losses, 0-dim. Needed on the rank
            of the last stage.
        tied: for each group of schedule.tied this rank's parameters by stage. Their initial values must be equal. Two
            stages of one rank may share one parameter.
        hooks: functions that the schedule calls for a stage: `reduce` its gradients over data-parallel ranks, `unshard`
            and `reshard` its weights, `update` it (required for asynchronous schedules). See stage_hooks.py.
        reduce_gradients, update: `reduce` and `update` as single functions, instead of `hooks`.
        transport: a network other than NCCL or gloo (tests).
        lookahead: number of computations by which a receive is posted before its use.
        timeout_s: time-out of a wait, in seconds.
        scatter_group: R ranks whose stages return the same tensors (tensor-parallel ranks without sequence
            parallelism), each in a pipeline of its own. Each sends 1 / R of a message, and the receivers gather it.
            The rank in this group is the same on all ranks of a pipeline. None: each rank sends whole tensors.
        auxiliary_losses: whether stages other than the last may return modules.auxiliary_loss.WithAuxiliaryLoss in
            training; the same on all ranks. Such a loss is added to the loss of the microbatch, divided by the same
            loss_divisor, and contributes to the gradients.
        observe: called with (action, start, end) after each computation; times in seconds, as time.perf_counter.

    Raises:
        InputError: on every rank, before any stage runs: the schedule breaks a rule; the stages are not the ones that
            the schedule places on this rank; the last rank has no loss_fn; an asynchronous schedule has no update, or
            sharded weights; schedules, tied weights or the places in scatter_group differ between ranks.

    Communication: at the start a hash of all facts that must agree, and one connection for each pair of ranks and
        direction. In a step: the tensors between stages; before it one all-reduce and after it one broadcast of 8 bytes
        for each microbatch; with auxiliary_losses one more such all-reduce. With scatter_group each rank sends 1 / R of
        a tensor, and all R gather it (one all-gather of the tensor). For an input with new shapes, once: 1 KiB
        forward and 8 bytes backward on each connection.
    Memory: a copy of each output until its receiver has taken it, and receive buffers for one microbatch. Live
        activations as in `peak_live_activations`, and one received tensor more.
    Numerics: synchronous schedules add the gradients of a stage in the order of the microbatches, bitwise as one
        process that does the same. Gradients of a tied weight are summed for each stage, and these sums once at the
        end. A parameter that two stages of a rank share accumulates in the order of the schedule.

    Papers: docs/schedules.md names the paper of each schedule. Split backward: Qi et al. 2023 (arXiv:2401.10241).
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
        scatter_group: Group = None,
        auxiliary_losses: bool = False,
        observe: Callable[[Action, float, float], None] | None = None,
    ) -> None:
        self._rank = group_rank(pp_group)
        lowered, error, parts = None, None, MessageParts(None)
        try:
            parts = MessageParts(scatter_group)
            hooks = chosen_hooks(hooks, reduce_gradients, update)
            lowered = checked_and_lowered(schedule, stages, pp_group, loss_fn, tied, hooks)
        except InputError as wrong:
            error = wrong
        hashes = [[tensor_hash(weight) for weight in group.values()] for group in tied]
        name = agree(pp_group, error, lowered, hashes, auxiliary_losses, parts.place)
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
        self._other_steps: dict[int, Schedule] = {}
        stashed = {stage: StashedWeights(module, stage, lowered) for stage, module in stages.items()}
        self.stashed = stashed if lowered.weights != SYNCHRONOUS else {}
        """Versions of the weights of this rank's stages, in asynchronous schedules."""
        self._loop = ActionLoop(
            lowered,
            self._rank,
            self._stages,
            self.stashed,
            [TiedWeight(weights, *group) for weights, group in zip(tied, self._connections.tied_groups, strict=True)],
            Messages(lowered, self._connections.transport, device, parts, self._connections.global_ranks),
            hooks,
            observe,
            lookahead,
        )
        self.microbatch_losses = torch.zeros(0, dtype=torch.float64)
        """Loss sum of each microbatch in the last step or evaluation, on every rank."""

    @property
    def current_action(self) -> Action | None:
        """The action that this rank runs; None between steps."""
        return self._loop.current_action

    def run_actions_in(self, around: Around | None) -> None:
        """Run each action of later steps in a context of the caller's, such as a range of NVTX; None: in none.

        Args:
            around: called with the action; sends and receives are actions too.
        """
        self._loop.around = around

    @property
    def num_live(self) -> int:
        """Number of microbatches of stages whose forward is done and whose backward is not."""
        return sum(stage.num_live for stage in self._stages.values())

    def step(
        self,
        inputs: Sequence[Any] | None = None,
        targets: Sequence[Any] | None = None,
        *,
        loss_divisor: float | Sequence[float],
        stage_kwargs: Sequence[Mapping[str, Any]] | None = None,
    ) -> torch.Tensor:
        """Run forward and backward of all microbatches.

        With an asynchronous schedule, whose steps overlap, one call runs all steps: inputs and targets hold the
        microbatches of all of them, loss_divisor is the divisor of one, and the result is the sum of their losses.
        Divisors, one for each step, may be of any number of steps, which this call then runs. The numbers do not
        depend on where the steps are cut into calls.

        Args:
            inputs: on the rank of stage 0 a tensor, or a tuple of tensors, for each microbatch. Ignored on other ranks.
            targets: on the rank of the last stage the target of loss_fn for each microbatch. Ignored on other ranks.
            loss_divisor: the loss is the sum over the microbatches, divided by this: the number of tokens that count,
                over all data-parallel ranks. Gradients are divided with the loss, once. Several, the same number on all
                ranks: one for each overlapping step.
            stage_kwargs: for each microbatch keyword arguments of every stage, the same on all ranks.

        Returns:
            The loss, 0-dim float64, on every rank.

        Raises:
            InputError: on every rank, before anything is sent: an argument of some rank is wrong; nothing to train.
            PipelineError: another rank failed or is gone; names the rank and the action. The executor is closed then.
        """
        with torch.enable_grad():
            if isinstance(loss_divisor, int | float):
                return self._run(inputs, targets, (loss_divisor,), stage_kwargs, True, self.schedule)
            schedule = self._of_steps(len(loss_divisor))
            return self._run(inputs, targets, tuple(loss_divisor), stage_kwargs, True, schedule)

    def evaluate(
        self,
        inputs: Sequence[Any] | None = None,
        targets: Sequence[Any] | None = None,
        *,
        loss_divisor: float = 1.0,
        stage_kwargs: Sequence[Mapping[str, Any]] | None = None,
    ) -> torch.Tensor:
        """Compute only the loss, by the same schedule without backwards. Arguments, result and errors as step()."""
        with torch.no_grad():
            return self._run(inputs, targets, (loss_divisor,), stage_kwargs, False, self.schedule)

    def close(self) -> None:
        """Cut the connections of this pipeline; the stages stay as they are."""
        self._loop.clear()
        self._connections.close()

    def _of_steps(self, num_steps: int) -> Schedule:
        """Return the lowered schedule of a number of overlapping steps."""
        own = self.schedule
        if num_steps == own.num_steps:
            return own
        if num_steps not in self._other_steps:
            check(
                own.weights != SYNCHRONOUS,
                f"loss_divisor has {num_steps} numbers: one wanted, since the steps of {own.name} do not overlap",
            )
            other = build_schedule(own.name, own.num_ranks, own.num_microbatches, num_steps=num_steps)
            self._other_steps[num_steps] = lower(other)
        return self._other_steps[num_steps]

    def _run(
        self,
        inputs: Sequence[Any] | None,
        targets: Sequence[Any] | None,
        loss_divisors: tuple[float, ...],
        stage_kwargs: Sequence[Mapping[str, Any]] | None,
        training: bool,
        schedule: Schedule,
    ) -> torch.Tensor:
        connections, loop = self._connections, self._loop
        for stage in self._stages.values():
            stage.auxiliary_losses.clear()
        if connections.closed:
            raise RuntimeError("this PipelineExecutor is closed, by close() or after a fault (make a new one)")
        try:
            step = self._begin(inputs, targets, loss_divisors, stage_kwargs, training, schedule)
            losses = loop.run(step, connections.table.shape_ids, training, schedule)
            count = len(schedule.microbatches)
            shared = connections.share_losses([losses[m] for m in range(count)] if losses else None, count)
            if training and self._auxiliary_losses:
                shared = connections.add_auxiliary_losses(shared, [s.auxiliary_losses for s in self._stages.values()])
        except SharedInputError:  # raised before anything was sent: the pipeline stays open
            loop.clear()
            raise
        except PeerLost as lost:
            fault = connections.fault(lost.rank, lost, str(loop.current_action) if loop.current_action else None)
            self.close()
            raise fault from lost
        except BaseException as error:
            self._give_up(error)
            raise
        self.microbatch_losses = shared
        if len(loss_divisors) == 1:
            return shared.sum() / loss_divisors[0]
        return (shared.view(len(loss_divisors), -1).sum(1) / shared.new_tensor(loss_divisors)).sum()

    def _begin(
        self,
        inputs: Sequence[Any] | None,
        targets: Sequence[Any] | None,
        loss_divisors: tuple[float, ...],
        stage_kwargs: Sequence[Mapping[str, Any]] | None,
        training: bool,
        schedule: Schedule,
    ) -> StepInputs:
        """Check the arguments, and start to exchange the result with the other ranks while the first stage computes."""
        step, error, ids = None, None, None
        try:
            device = self._connections.device
            step = step_inputs(schedule, self._rank, device, inputs, targets, loss_divisors, stage_kwargs)
        except InputError as wrong:
            error = wrong
        count = len(schedule.microbatches)
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
        """Report the failure of this rank to the others, and close the connections on which they wait."""
        action = self._loop.current_action
        self._connections.faults.write(self._rank, str(action) if action else None, first_line(error))
        self.close()
