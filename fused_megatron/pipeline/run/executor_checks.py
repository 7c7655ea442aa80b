"""Checks of the arguments of a PipelineExecutor and of its steps, before anything is sent."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import InputError, check
from fused_megatron.collectives.groups import Group, group_rank, group_size
from fused_megatron.pipeline.run.action_loop import StepInputs
from fused_megatron.pipeline.run.stage_compute import StageCompute
from fused_megatron.pipeline.run.stage_hooks import StageFunctions, StageHooks, Wait, do_nothing
from fused_megatron.pipeline.schedule.action import SYNCHRONOUS, Kind, Schedule, stages_of
from fused_megatron.pipeline.schedule.lowering import lower
from fused_megatron.pipeline.schedule.schedule_checks import schedule_findings


def checked_and_lowered(
    schedule: Schedule,
    stages: Mapping[int, nn.Module],
    pp_group: Group,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None,
    tied: Sequence[Mapping[int, nn.Parameter]],
    hooks: StageHooks,
) -> Schedule:
    """Check the arguments of a PipelineExecutor on this rank, and return the schedule, lowered.

    Raises:
        InputError: the schedule breaks a rule, or another argument does not fit the schedule.
    """
    ranks, rank = group_size(pp_group), group_rank(pp_group)
    check(
        schedule.num_ranks == ranks,
        f"schedule {schedule.name} is for {schedule.num_ranks} ranks, and pp_group has {ranks}",
    )
    if not schedule.lowered:
        schedule = lower(schedule)
    elif findings := schedule_findings(schedule):
        raise InputError(f"schedule {schedule.name}: {findings[0]}")
    wanted = sorted(stages_of(schedule.placement, rank))
    check(
        sorted(stages) == wanted,
        f"stages={sorted(stages)} must be {wanted} on rank {rank}, where {schedule.name} places them",
    )
    for stage, module in stages.items():
        check(isinstance(module, nn.Module), f"stages[{stage}]={type(module).__name__} must be an nn.Module")
    last = schedule.num_stages - 1
    check(
        last not in stages or loss_fn is not None,
        f"loss_fn=None must be given on rank {rank}, of the last stage {last}",
    )
    if schedule.weights != SYNCHRONOUS:
        has_update = hooks.update is not do_nothing
        check(has_update, f"update=None must be given for {schedule.name}, which updates within the schedule")
        sharded = any(action.kind == Kind.UNSHARD for actions in schedule.actions for action in actions)
        check(not sharded, f"schedule {schedule.name}: UNSHARD needs a synchronous schedule (one version of weights)")
    _check_tied(schedule, stages, tied)
    devices = {stage_device(module) for module in stages.values()} - {None}
    check(len(devices) <= 1, f"stages are on different devices: {', '.join(sorted(map(str, devices)))}")
    return schedule


def chosen_hooks(
    hooks: StageHooks | None,
    reduce_gradients: Callable[[int], Wait | None] | None,
    update: Callable[[int, int], None] | None,
) -> StageHooks:
    """Return hooks, or hooks made of the two functions.

    Raises:
        InputError: hooks and a function are given.
    """
    if hooks is None:
        return StageFunctions(reduce=reduce_gradients or do_nothing, update=update or do_nothing)
    check(
        reduce_gradients is None and update is None,
        "hooks= is given, and so is reduce_gradients= or update=: make them hooks.reduce and hooks.update",
    )
    return hooks


def _check_tied(
    schedule: Schedule, stages: Mapping[int, nn.Module], tied: Sequence[Mapping[int, nn.Parameter]]
) -> None:
    check(
        len(tied) == len(schedule.tied),
        f"tied has {len(tied)} groups, and schedule.tied {len(schedule.tied)}: {schedule.tied}",
    )
    for index, (parameters, group) in enumerate(zip(tied, schedule.tied, strict=True)):
        found, wanted = sorted(parameters), sorted(set(group) & set(stages))
        check(found == wanted, f"tied[{index}] has stages {found}, and must have {wanted} on this rank")
        for stage, parameter in parameters.items():
            check(
                any(parameter is own for own in stages[stage].parameters()),
                f"tied[{index}][{stage}] must be a parameter of stage {stage}",
            )


def stage_device(module: nn.Module) -> torch.device | None:
    """Return the device of a stage's parameters or buffers; None if it has neither."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return None


def step_inputs(
    schedule: Schedule,
    rank: int,
    device: torch.device,
    inputs: Sequence[Any] | None,
    targets: Sequence[Any] | None,
    loss_divisors: tuple[float, ...],
    stage_kwargs: Sequence[Mapping[str, Any]] | None,
) -> StepInputs:
    """Check the arguments of a step, and return the part that this rank needs.

    Raises:
        InputError: an argument is missing, has not one item for each microbatch, or has the wrong type or device.
    """
    for loss_divisor in loss_divisors:
        check(
            isinstance(loss_divisor, int | float) and math.isfinite(loss_divisor) and loss_divisor > 0,
            f"loss_divisor={loss_divisor!r} must be a number above 0",
        )
    count = len(schedule.microbatches)
    own_inputs: list[tuple[torch.Tensor, ...]] = []
    if schedule.placement[0] == rank:
        items = _items("inputs", inputs, count)
        for index, item in enumerate(items):
            tensors = item if isinstance(item, tuple) else (item,)
            for tensor in tensors:
                what = f"inputs[{index}]"
                check(
                    isinstance(tensor, torch.Tensor), f"{what} is a {type(tensor).__name__}: a tensor or tuple wanted"
                )
                check(tensor.device == device, f"{what}.device={tensor.device} must be {device}, as the stages")
            own_inputs.append(tensors)
    own_targets: Sequence[Any] = ()
    if schedule.placement[-1] == rank:
        own_targets = _items("targets", targets, count)
        for index, target in enumerate(own_targets):
            if isinstance(target, torch.Tensor):
                what = f"targets[{index}].device={target.device}"
                check(target.device == device, f"{what} must be {device}, as the stages")
    kwargs = () if stage_kwargs is None else _items("stage_kwargs", stage_kwargs, count)
    return StepInputs(own_inputs, own_targets, kwargs, loss_divisors, count)


def needs_gradients(stages: Iterable[StageCompute], step: StepInputs) -> bool:
    """Whether a parameter of this rank's stages, or an input of the step, requires a gradient."""
    if any(p.requires_grad for stage in stages for p in stage.module.parameters()):
        return True
    inputs = [*step.inputs, *(kwargs.values() for kwargs in step.kwargs)]
    return any(isinstance(x, torch.Tensor) and x.requires_grad for values in inputs for x in values)


def _items(name: str, value: Any, count: int) -> Sequence[Any]:
    check(value is not None, f"{name}=None must be given on this rank: one for each of {count} microbatches")
    check(
        isinstance(value, Sequence),
        f"{name} is a {type(value).__name__}: a list wanted, one item for each microbatch (tensor.chunk({count}))",
    )
    check(len(value) == count, f"{name} has {len(value)} items: one for each of {count} microbatches wanted")
    return value
