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
from fused_megatron.models import BatchPosition
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
    loss_sum = _forward_and_backward(assembly, read_batch(), step, targets_per_sample)
    mesh = assembly.mesh
    norm = float(global_gradient_norm(assembly.parameters, assembly.gradients, mesh.tp_group, mesh.pp_group))
    sums = sum_over_ranks(assembly, loss_sum, norm, flags(), group)
    judge(sums)
    assembly.optimizer.step(lr, clip_coefficient(norm, assembly.config.optimizer.clip_norm))
    return sums


def _forward_and_backward(assembly: Assembly, batch: Batch, step: int, targets_per_sample: int) -> torch.Tensor:
    """The pipeline's step; this data-parallel rank's part of the loss, gradients summed over all of them.

    Nothing can deadlock between a pipeline's messages and the collectives inside its stages. The ranks that share a
    stage (over tp and dp) have the same list of actions, each in a pipeline of its own; the lists of one pipeline
    cannot deadlock (lowering.py). Take the actions of all in the order in which that pipeline could do them one
    after the other: when it comes to an action, all ranks that share its stage have done what stands before it, so
    they all come to it, its messages are there, and its collectives find their partners.
    """
    training, mesh = assembly.config.training, assembly.mesh
    inputs, targets, keywords = batch.microbatches(training.microbatch_size, assembly.device)
    first_sample = mesh.dp_rank * training.microbatch_size * len(inputs)
    positions = [
        BatchPosition(step, first_sample + i * training.microbatch_size, training.global_batch_size)
        for i in range(len(inputs))
    ]
    return assembly.accumulate_gradients(
        inputs,
        targets,
        loss_divisor=gradient_divisor(training.global_batch_size, targets_per_sample),
        stage_kwargs=[{"position": p, **keyword} for p, keyword in zip(positions, keywords, strict=True)],
    )


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
