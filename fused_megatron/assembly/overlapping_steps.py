"""Training steps that overlap, under an asynchronous schedule.

PipeDream (Narayanan et al., SOSP 2019) and PipeDream-2BW (Narayanan et al., arXiv 2006.09503).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fused_megatron.assembly.assemble import Assembly
from fused_megatron.collectives import Group
from fused_megatron.collectives.together import sum_over_ranks_
from fused_megatron.config import TrainingConfig
from fused_megatron.data.batch import Batch
from fused_megatron.data_parallel.gradient_division import gradient_divisor


class OverlappingStep(NamedTuple):
    """One of the steps that overlap.

    Attributes:
        batch: this data-parallel rank's rows of the global batch.
        number: of the step, from 0.
        lr: learning rate of its update.
        num_targets: its targets, over all data-parallel ranks and microbatches.
    """

    batch: Batch
    number: int
    lr: float
    num_targets: int


class OverlappingSums(NamedTuple):
    """Sums of overlapping steps over all ranks, in host memory.

    Attributes:
        losses: of each step, the mean over the targets of its global batch.
        gradient_norms: of each step, of the whole model before clipping. The stages measure a step at different times.
        flags: the ranks' flags, summed over the ranks.
    """

    losses: list[float]
    gradient_norms: list[float]
    flags: list[float]


def steps_until_pause(step: int, training: TrainingConfig, most: int) -> int:
    """Return the number of steps, at most `most`, until one after which a run pauses: for an evaluation, say."""
    intervals = (training.replica_check_interval, training.eval_interval, training.checkpoint_interval)
    pauses = [interval - step % interval for interval in intervals if interval]
    return min(most, training.num_steps - step, *pauses)


def run_overlapping_steps(
    assembly: Assembly,
    steps: Sequence[OverlappingStep],
    flags: Callable[[], Sequence[float]],
    group: Group,
) -> OverlappingSums:
    """Run steps that overlap, and drain the pipeline. Every rank must call this together, with equally many steps.

    The update rule does not depend on where a run is cut into calls: each stage keeps the older versions of its weights
    that the next call reads.

    Args:
        assembly: of this rank, with an asynchronous schedule.
        steps: the steps.
        flags: called after the last update; returns numbers to be summed over the ranks, equally many on every rank.
        group: all ranks of the run.

    Raises:
        PipelineError: as PipelineExecutor.step.

    Communication: of PipelineExecutor.step and StageUpdates.update; one all-reduce of 8 bytes a number over all ranks.
    """
    assert assembly.updates is not None
    assembly.updates.begin(assembly, [step.lr for step in steps])
    cut = [assembly.microbatches_of(step.batch, step.number) for step in steps]
    divisors = [gradient_divisor(step.num_targets) for step in steps]
    assembly.executor.step(
        [x for inputs, _, _ in cut for x in inputs],
        [target for _, targets, _ in cut for target in targets],
        loss_divisor=divisors,
        stage_kwargs=[keywords for *_, of_step in cut for keywords in of_step],
    )
    mesh, losses = assembly.mesh, assembly.executor.microbatch_losses
    losses = losses.view(len(steps), -1).sum(1) / losses.new_tensor(divisors)
    # All ranks of a pipeline and of a tensor-parallel group hold the loss of their samples and positions.
    losses = losses / (mesh.tp_size * mesh.pp_size)
    squares = torch.stack(assembly.updates.squares) / (mesh.world_size // mesh.pp_size)
    message = torch.cat([losses.to(squares.device), squares, squares.new_tensor(list(flags()))])
    sum_over_ranks_(message, group)
    count, numbers = len(steps), message.tolist()
    norms = message[count : 2 * count].sqrt().float().tolist()
    return OverlappingSums(numbers[:count], norms, numbers[2 * count :])
