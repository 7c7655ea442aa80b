"""Agreement of the ranks of a pipeline on their arguments, before anything else is sent."""

import hashlib
import secrets
from collections.abc import Sequence

import torch
import torch.distributed as dist

from fused_megatron.checks import InputError, SharedInputError, first_line, has_values
from fused_megatron.collectives.together import Outcome, failed_ranks, gather_outcomes, shared_text
from fused_megatron.pipeline.run.faults import PipelineError
from fused_megatron.pipeline.schedule.action import Schedule
from fused_megatron.pipeline.schedule.schedule_files import to_json

_HERE = "the pipeline was being set up"


def schedule_hash(schedule: Schedule) -> str:
    """Return a hash of the whole schedule."""
    return hashlib.sha256(to_json(schedule).encode()).hexdigest()[:16]


def tensor_hash(tensor: torch.Tensor) -> str:
    """Return a hash of shape, dtype and every bit, if the tensor has values."""
    digest = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest_size=16)
    if has_values(tensor):
        # A copy: memory that numpy has seen cannot be freed and filled again, as sharded weights are.
        copy = tensor.detach().to("cpu", copy=True).contiguous()
        digest.update(copy.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def agree(
    group: dist.ProcessGroup | None,
    error: InputError | None,
    schedule: Schedule | None,
    tied: Sequence[Sequence[str]],
    auxiliary_losses: bool,
    scatter: tuple[int, int] = (0, 1),
) -> str:
    """Compare the arguments of all ranks, and return a unique name of this pipeline, the same on all ranks.

    Args:
        group: the ranks of the pipeline; None for one rank.
        error: error in the arguments of this rank; None if there is none.
        schedule: the lowered schedule; None with an error.
        tied: for each tied weight the hashes of this rank's parameters.
        auxiliary_losses: whether stages may return auxiliary losses.
        scatter: this rank's index in its scatter_group, and the size of that group.

    Raises:
        SharedInputError: on every rank: a rank has an error, or schedules, initial tied weights, auxiliary_losses or
            scatter differ.
        PipelineError: another rank is gone or silent.
    """
    mine = {
        "schedule": None if schedule is None else [_shown(schedule), schedule_hash(schedule)],
        "tied": tied,
        "auxiliary_losses": auxiliary_losses,
        "scatter": list(scatter),
        "name": secrets.token_hex(8),
    }
    try:
        everyone = gather_outcomes(group, mine, error)  # the first bytes of the pipeline
    except RuntimeError as lost:  # a time-out, or the connection to a rank that is gone
        raise PipelineError(f"pipeline: another rank is gone ({first_line(lost)}); {_HERE}", -1) from lost
    text = _fault(everyone)
    if text is not None:
        raise SharedInputError(text) from error
    return f"pipeline-{everyone[0].value['name']}"


def _fault(everyone: Sequence[Outcome]) -> str | None:
    if failed_ranks(everyone):
        return shared_text(everyone)[0]
    values = [outcome.value for outcome in everyone]
    first = values[0]
    for rank, each in enumerate(values):
        if each["schedule"] != first["schedule"]:
            here, there = (f"{shown} (hash {digest})" for shown, digest in (first["schedule"], each["schedule"]))
            return f"the schedule must be the same on all ranks: rank 0 has {here}, rank {rank} has {there}"
        if each["auxiliary_losses"] != first["auxiliary_losses"]:
            return f"auxiliary_losses={first['auxiliary_losses']} on rank 0 must be the same on rank {rank}"
        if each["scatter"] != first["scatter"]:
            here, there = ("{} of {}".format(*place) for place in (first["scatter"], each["scatter"]))
            return (
                f"scatter_group: pipeline rank 0 is rank {here} in it, and pipeline rank {rank} is rank {there}; the "
                "ends of a message must have the same part (pass the tensor-parallel group of a mesh, on every rank)"
            )
    for index in range(len(first["tied"])):
        hashes = [(rank, digest) for rank, each in enumerate(values) for digest in each["tied"][index]]
        for rank, digest in hashes:
            if digest != hashes[0][1]:
                return (
                    f"tied[{index}]: the weight of rank {rank} differs from the weight of rank {hashes[0][0]} (start "
                    "from one value: copy or broadcast it, or draw it from one seed)"
                )
    return None


def _shown(schedule: Schedule) -> str:
    return (
        f"{schedule.name}: {schedule.num_stages} stages on {schedule.num_ranks} ranks, {schedule.num_microbatches} "
        f"microbatches"
    )
