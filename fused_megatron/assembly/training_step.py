"""One training step of a rank: gradients of its batch, gradient norm, agreement of all ranks, optimizer update."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fused_megatron.assembly.assemble import Assembly
from fused_megatron.collectives import Group
from fused_megatron.collectives.together import sum_over_ranks_
from fused_megatron.data.batch import Batch
from fused_megatron.data_parallel.gradient_division import gradient_divisor
from fused_megatron.sharding.gradient_norm import clip_coefficient


@dataclass(frozen=True)
class StepSums:
    """Sums over all ranks that are known before the update of a step.

    Attributes:
        loss: mean over the targets of the global batch, with auxiliary losses.
        gradient_norm: of the whole model, before clipping.
        finite: True if the loss and the gradient norm are finite on every rank.
        flags: the ranks' flags, summed over the ranks.
        expert_loads: loads of the experts, summed over the ranks, as ExpertLoads.of_rank; it stays on the device.
    """

    loss: float
    gradient_norm: float
    finite: bool
    flags: list[float]
    expert_loads: torch.Tensor


def training_step(
    assembly: Assembly,
    read_batch: Callable[[], Batch],
    *,
    step: int,
    lr: float,
    num_targets: int,
    group: Group,
    flags: Callable[[], Sequence[float]],
    judge: Callable[[StepSums], None],
) -> StepSums:
    """Do one optimizer step. Every rank must call this together.

    Args:
        assembly: of this rank.
        read_batch: returns this data-parallel rank's rows of the global batch.
        step: number of the step, from 0.
        lr: learning rate of the update.
        num_targets: targets of the step, over all data-parallel ranks and microbatches.
        group: all ranks of the run.
        flags: called after backward; returns numbers to be summed over the ranks, equally many on every rank.
        judge: called with the sums before the update; it must raise, the same on every rank, to keep the weights.

    Raises:
        PipelineError: as PipelineExecutor.step.
        Any error that judge raises.

    Communication: as Assembly.accumulate_batch and update; one all-reduce of 8 bytes a number over all ranks, the
        loads of the experts included (E + 3 numbers a block with experts).
    """
    assembly.gradients.zero_()
    assembly.expert_loads.zero_()
    loss_sum = assembly.accumulate_batch(read_batch(), step, gradient_divisor(num_targets))
    sums = sum_over_ranks(assembly, loss_sum, flags(), group)
    judge(sums)
    assembly.update(lr, clip_coefficient(sums.gradient_norm, assembly.config.optimizer.clip_norm))
    assembly.expert_loads.update(sums.expert_loads)
    return sums


def sum_over_ranks(assembly: Assembly, loss_sum: torch.Tensor, flags: Sequence[float], group: Group) -> StepSums:
    """Sum the loss, the squares of the gradients, the flags and the experts' loads over all ranks with one all-reduce.

    The host reads all sums but the loads in one piece: it waits for the device once.
    All ranks get the same numbers, and so agree on `finite`: a NaN of one rank is in the sum.
    """
    # They all hold the loss of their samples and positions.
    layer_ranks = assembly.mesh.tp_size * assembly.mesh.pp_size
    squares = assembly.share_of_squares()
    # Filled on the device: a copy of a list would make the host wait for it.
    numbers = [squares.new_full((), flag) for flag in flags]
    numbers = [(loss_sum / layer_ranks).reshape(()), squares, *numbers]
    loads = assembly.expert_loads.of_rank(squares.device)
    message = torch.cat([torch.stack(numbers), loads.flatten()])
    sum_over_ranks_(message, group)
    # In float32, so that the order of the sums, which follows the layout, does not reach the weights by clipping.
    message[1] = message[1].sqrt().float()
    loss, norm, *summed = message[: len(numbers)].tolist()
    finite = math.isfinite(norm) and math.isfinite(loss)
    return StepSums(loss, norm, finite, summed, message[len(numbers) :].view_as(loads))
