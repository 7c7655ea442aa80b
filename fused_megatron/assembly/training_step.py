"""One training step of a rank: gradients of its batch, their norm, what all ranks say, the update."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fused_megatron.assembly.assemble import Assembly
from fused_megatron.collectives import Group
from fused_megatron.collectives.together import sum_over_ranks_
from fused_megatron.data.batch import Batch
from fused_megatron.data_parallel.gradient_division import gradient_divisor
from fused_megatron.sharding.gradient_norm import clip_coefficient, global_gradient_norm


@dataclass(frozen=True)
class StepSums:
    """What all ranks know of a step before its update.

    Attributes:
        loss: the mean over the targets of the global batch.
        gradient_norm: of the whole model, before clipping.
        finite: whether the loss and the norm are, on every rank.
        flags: the sums over the ranks of what each of them said.
    """

    loss: float
    gradient_norm: float
    finite: bool
    flags: list[float]


def training_step(
    assembly: Assembly,
    read_batch: Callable[[], Batch],
    *,
    step: int,
    lr: float,
    targets_per_sample: int,
    group: Group,
    flags: Callable[[], Sequence[float]],
    judge: Callable[[StepSums], None],
) -> StepSums:
    """One optimizer step; every rank calls it at once.

    Args:
        assembly: of this rank.
        read_batch: gives this data-parallel rank's rows of the global batch.
        step: its number, from 0.
        lr: learning rate of the update.
        targets_per_sample: targets that each sample of the batch has.
        group: all ranks of the run.
        flags: asked after backward for numbers that are summed over the ranks; as many on each of them.
        judge: told the sums before the update; raises the same on every rank where the weights must stay as they are.

    Raises:
        PipelineError: as PipelineExecutor.step.
        Whatever judge raises.

    Communication: as Assembly.accumulate_gradients and global_gradient_norm; one all-reduce of 8 bytes a number over
        all ranks.
    """
    assembly.gradients.zero_()
    divisor = gradient_divisor(assembly.config.training.global_batch_size, targets_per_sample)
    loss_sum = assembly.accumulate_batch(read_batch(), step, divisor)
    mesh = assembly.mesh
    norm = float(global_gradient_norm(assembly.parameters, assembly.gradients, mesh.tp_group, mesh.pp_group))
    sums = sum_over_ranks(assembly, loss_sum, norm, flags(), group)
    judge(sums)
    assembly.optimizer.step(lr, clip_coefficient(norm, assembly.config.optimizer.clip_norm))
    return sums


def sum_over_ranks(
    assembly: Assembly, loss_sum: torch.Tensor, norm: float, flags: Sequence[float], group: Group
) -> StepSums:
    """The loss over all data-parallel ranks, whether all is finite, and what every rank says, in one message.

    A gradient that is not finite on one rank (its memory, its device) is not so on its replicas.
    """
    layer_ranks = assembly.mesh.tp_size * assembly.mesh.pp_size  # all of them have the loss of their data-parallel rank
    said = loss_sum.new_tensor([float(not math.isfinite(norm)), *flags])
    message = torch.cat([(loss_sum / layer_ranks).reshape(1), said])
    sum_over_ranks_(message, group)
    loss, faults, *summed = message.tolist()
    return StepSums(loss, norm, faults == 0 and math.isfinite(loss), summed)
