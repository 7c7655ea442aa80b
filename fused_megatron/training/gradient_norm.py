"""The 2-norm of all gradients, each parameter counted once whatever the layout."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.collectives import group_rank
from fused_megatron.collectives.together import sum_over_ranks_
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.tensor_parallel import parameter_parts

ROW = 4096


def global_gradient_norm(
    parameters: Mapping[str, nn.Parameter],
    gradients: GradientBuckets,
    tp_group: dist.ProcessGroup | None,
    pp_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """2-norm over the full parameters, a 0-dim float64 tensor, the same on every rank.

    A shard counts on its own rank; a replicated parameter, whose gradient every tensor-parallel rank holds, on
    rank 0 alone, and one of several copies of a shard (a tied embedding's, too) on the rank that holds the first. Call
    it after the gradients are summed over data-parallel ranks and over the stages of tied weights.

    Communication:
        One all-reduce of 8 bytes over tp_group, one over pp_group.
    """
    first = group_rank(tp_group) == 0
    squares = torch.zeros((), dtype=torch.float64, device=next(iter(parameters.values())).device)
    for parameter in parameters.values():
        for part in parameter_parts(parameter):
            if part.shard.copy == 0 and (first or not part.shard.replicated):
                squares += _sum_of_squares(part.of(gradients[parameter]))
    for group in (tp_group, pp_group):
        sum_over_ranks_(squares, group)
    return squares.sqrt()


def _sum_of_squares(gradient: torch.Tensor) -> torch.Tensor:
    """Of all elements, a 0-dim float64 tensor, in one pass.

    torch sums a long float32 vector on the CPU to about 3e-5 only, and another sum for every way to shard it; rows
    of 4096 are summed to 1e-9, and their few sums in float64.
    """
    flat = gradient.reshape(-1)
    whole = flat.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1).double()
    return rows.square().sum() + flat[whole:].double().square().sum()


def clip_coefficient(norm: float, clip_norm: float) -> float:
    """What to multiply gradients by, at most 1; clip_norm 0 means no clipping. As torch's clip_grad_norm_."""
    return min(1.0, clip_norm / (norm + 1e-6)) if clip_norm > 0 else 1.0


def non_finite_parameters(parameters: Mapping[str, nn.Parameter], gradients: GradientBuckets) -> list[str]:
    """Names of this rank's parameters whose gradient holds a NaN or an infinity."""
    return [name for name, p in parameters.items() if not bool(torch.isfinite(gradients[p]).all())]
