"""One training step of a rank: gradients of its batch, gradient norm, agreement of all ranks, optimizer update."""

from collections.abc import Callable, Sequence

from fused_megatron.assembly.assemble import Assembly
from fused_megatron.assembly.step_sums import DeviceSums, StepSums, start_sums
from fused_megatron.collectives import Group
from fused_megatron.data.batch import Batch
from fused_megatron.data_parallel.gradient_division import gradient_divisor
from fused_megatron.sharding.gradient_norm import clip_coefficient


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
    before_update: Callable[[], None] = lambda: None,
) -> StepSums:
    """Do one optimizer step. Every rank must call this together.

    The host waits for the device once. An optimizer that decides on the device whether it updates is given its work
    before this wait, so that the device never waits for the host; for other optimizers the host waits before the
    update.

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
        judge: called with the sums; it must raise, the same on every rank, where the weights were kept.
        before_update: called before any weight changes.

    Raises:
        PipelineError: as PipelineExecutor.step.
        Any error that judge raises.

    Communication: as Assembly.accumulate_batch and update; one all-reduce of 8 bytes a number over all ranks, the
        loads of the experts included (E + 3 numbers a block with experts).
    """
    assembly.gradients.zero_()
    assembly.expert_loads.zero_()
    loss_sum = assembly.accumulate_batch(read_batch(), step, gradient_divisor(num_targets))
    on_device = start_sums(assembly, loss_sum, flags(), group)
    if assembly.optimizer.refuses_on_device:
        before_update()
        update_unless_refused(assembly, on_device, lr, num_refusing)
        sums = on_device.read()
        judge(sums)
        return sums
    sums = on_device.read()
    judge(sums)
    before_update()
    assembly.update(lr, clip_coefficient(sums.gradient_norm, assembly.config.optimizer.clip_norm))
    assembly.expert_loads.update(on_device.expert_loads)
    return sums


def update_unless_refused(assembly: Assembly, sums: DeviceSums, lr: float, num_refusing: int) -> None:
    """Clip the gradients and update the weights, as the sums on the device decide; the host does not wait."""
    refused = sums.refusal(num_refusing)
    assembly.update(lr, sums.gradient_scale(assembly.config.optimizer.clip_norm), refused)
    assembly.expert_loads.update(sums.expert_loads, refused)
