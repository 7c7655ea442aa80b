"""One training step of a rank: gradients of its batch, gradient norm, agreement of all ranks, optimizer update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fused_megatron.assembly.assemble import Assembly
from fused_megatron.assembly.step_sums import DeviceSums, StepSums, start_sums
from fused_megatron.collectives import Group
from fused_megatron.data.batch import Batch
from fused_megatron.data_parallel.gradient_division import gradient_divisor
from fused_megatron.sharding.gradient_norm import clip_coefficient


@dataclass(frozen=True)
class StepUnderWay:
    """A step that begin_step() has begun. Every rank must call finish() before it reads weights on the host.

    Attributes:
        assembly: of this rank.
        sums: of the step, on the device.
        lr: learning rate of the update.
        before_update: as in begin_step.
    """

    assembly: Assembly
    sums: DeviceSums
    lr: float
    before_update: Callable[[], None]

    def finish(self, judge: Callable[[StepSums], None]) -> StepSums:
        """Read the sums of the step, for which the host waits; update the weights if the device has not done so.

        Args:
            judge: called with the sums; it must raise, the same on every rank, where the weights were kept.

        Raises:
            Any error that judge raises.
        """
        sums = self.sums.read()
        try:
            judge(sums)
        except BaseException:
            self.assembly.gradients.were_zeroed = False  # the device has refused the update, and so kept them
            raise
        if not self.assembly.optimizer.refuses_on_device:
            self.before_update()
            scale = clip_coefficient(sums.gradient_norm, self.assembly.config.optimizer.clip_norm)
            self.assembly.update(self.lr, scale)
            self.assembly.expert_loads.update(self.sums.expert_loads)
        return sums


def begin_step(
    assembly: Assembly,
    read_batch: Callable[[], Batch],
    *,
    step: int,
    lr: float,
    num_targets: int,
    group: Group,
    flags: Callable[[], Sequence[float]],
    num_refusing: int,
    before_update: Callable[[], None] = lambda: None,
    refused_before: torch.Tensor | None = None,
) -> StepUnderWay:
    """Begin an optimizer step, without a wait of the host. Every rank must call this together.

    An optimizer that decides on the device whether it updates (Optimizer.refuses_on_device) is given its work here, so
    that the device never waits for the host. Others update in StepUnderWay.finish, after the host has read the sums.

    Args:
        assembly: of this rank.
        read_batch: returns this data-parallel rank's rows of the global batch.
        step: number of the step, from 0.
        lr: learning rate of the update.
        num_targets: targets of the step, over all data-parallel ranks and microbatches.
        group: all ranks of the run.
        flags: called after backward; returns numbers to be summed over the ranks, equally many on every rank.
        num_refusing: number of the first flags that keep the weights as they are. A loss or a norm that is not finite
            keeps them, too.
        before_update: called before any weight changes.
        refused_before: `sums.refused` of the step before, if that step is not finished yet: once the device has refused
            a step, it refuses all that follow. Only for an optimizer with refuses_on_device.

    Raises:
        PipelineError: as PipelineExecutor.step.

    Communication: as Assembly.accumulate_batch and update; one all-reduce of 8 bytes a number over all ranks, the
        loads of the experts included (E + 3 numbers a block with experts).
    """
    assembly.gradients.begin()
    assembly.expert_loads.zero_()
    loss_sum = assembly.accumulate_batch(read_batch(), step, gradient_divisor(num_targets))
    sums = start_sums(assembly, loss_sum, flags(), num_refusing, group)
    if assembly.optimizer.refuses_on_device:
        before_update()
        if refused_before is not None:
            sums.refused.logical_or_(refused_before)
        assembly.update(lr, sums.gradient_scale(assembly.config.optimizer.clip_norm), sums.refused)
        assembly.expert_loads.update(sums.expert_loads, sums.refused)
    else:
        assert refused_before is None
    return StepUnderWay(assembly, sums, lr, before_update)


def training_step(
    assembly: Assembly,
    read_batch: Callable[[], Batch],
    *,
    step: int,
    lr: float,
    num_targets: int,
    group: Group,
    flags: Callable[[], Sequence[float]],
    num_refusing: int,
    judge: Callable[[StepSums], None],
) -> StepSums:
    """Do one optimizer step, in which the host waits for the device once. Every rank must call this together.

    Args:
        judge: as in StepUnderWay.finish.
        Others: as in begin_step.

    Raises, Communication: as begin_step and StepUnderWay.finish.
    """
    begun = begin_step(
        assembly,
        read_batch,
        step=step,
        lr=lr,
        num_targets=num_targets,
        group=group,
        flags=flags,
        num_refusing=num_refusing,
    )
    return begun.finish(judge)
