"""Gradient norm of a sharded model: every element of the full model counts once."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from fused_megatron import ops
from fused_megatron.checks import check
from fused_megatron.collectives import Group, group_rank
from fused_megatron.collectives.together import sum_over_ranks_
from fused_megatron.collectives.transfers import start_all_gather
from fused_megatron.sharding.parameter_record import parameter_parts, parameter_record
from fused_megatron.sharding.parameter_shard import ShardPart
from fused_megatron.sharding.replica_shards import ReplicaShards, replica_shards
from fused_megatron.sharding.row_shards import WHOLE_ROWS, Rows
from fused_megatron.sharding.sharded_module import expert_ranks, parallel_group, parts_of_parameters


class Gradients(Protocol):
    """Gradients by parameter, each in the parameter's shape."""

    def __getitem__(self, parameter: nn.Parameter, /) -> torch.Tensor: ...


def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> torch.Tensor:
    """Clip all gradients of a model by their common norm: torch.nn.utils.clip_grad_norm_ for tensor-parallel models.

    torch's function sees this rank's shards only. It finds another norm on every rank, so that ranks would scale
    shared parameters differently. This function counts every element of the full model once. All ranks must call it.

    Args:
        model: after parallelize, or with layers of fused_megatron.tensor_parallel; also after shard_data_parallel or
            under FSDP2's fully_shard. For a pipeline stage the result is the norm of the stage (a tied weight counts
            in the first stage with it).
        max_norm: gradients are scaled so that their norm is at most this.
        norm_type: p; inf for the largest absolute value.
        error_if_nonfinite: raise if the norm is nan or inf.

    Returns:
        The norm before clipping, a scalar, the same on every tensor-parallel rank: float64 if a gradient is float64,
        else float32.

    Raises:
        InputError: model is no module, such as its parameters, which torch's function takes.
        RuntimeError: the norm is not finite, with error_if_nonfinite; the gradients are unchanged.

    Communication: one all-gather of one number; one more over data-parallel ranks that share rows; for experts one over
        each of their groups. With FSDP2 also the collectives of its own norms, and an all-gather of each gradient of
        which a rank counts some rows only (a projection that holds copies of key-value heads).
    """
    check(
        isinstance(model, nn.Module),
        f"model={type(model).__name__} must be the module itself, not its parameters: clip_grad_norm_(model, max_norm)",
    )
    group, shards, experts = parallel_group(model), replica_shards(model), expert_ranks(model)
    own = {} if shards is None else shards.gradients()
    if shards is None:
        counted = list(_counted_gradients(model, group_rank(group)))
    else:
        counted = list(_counted_rows(model, group_rank(group), own, shards.replicas.rows))
    norms = [_norm_over(model, [g for g, of_expert in counted if not of_expert], norm_type, (group, _owners(shards)))]
    if experts is not None:
        groups = (experts.etp_group, experts.ep_group, _owners(shards, of_experts=True))
        norms.append(_norm_over(model, [g for g, of_expert in counted if of_expert], norm_type, groups))
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type) if len(norms) > 1 else norms[0]
    if error_if_nonfinite and not math.isfinite(total.item()):
        raise RuntimeError(f"the gradient norm of order {norm_type} is {total.item()}, and cannot be clipped")
    if shards is None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, total)
    elif own:
        torch._foreach_mul_(list(own.values()), (max_norm / (total + 1e-6)).clamp(max=1.0))  # as torch
    return total


def _norm_over(
    model: nn.Module, counted: Sequence[torch.Tensor], norm_type: float, groups: Sequence[Group]
) -> torch.Tensor:
    """Return the norm of gradients that the ranks of groups share."""
    norm: Any = torch.nn.utils.get_total_norm(counted, norm_type)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # over FSDP2's ranks
    first = next(model.parameters(), torch.empty(0))
    wide = any(p.grad is not None and p.grad.dtype == torch.float64 for p in model.parameters())
    total: torch.Tensor = norm.to(first.device, torch.float64 if wide else torch.float32)
    for group in groups:
        total = torch.linalg.vector_norm(start_all_gather(total.view(1), 0, group).wait(), norm_type)
    return total


def _owners(shards: ReplicaShards | None, of_experts: bool = False) -> Group:
    """Return the ranks that own the other rows of dense parameters, or of experts."""
    if shards is None:
        return None
    return (shards.replicas.experts if of_experts else shards.replicas.dense).shard_group


def global_gradient_norm(
    parameters: Mapping[str, nn.Parameter],
    gradients: Gradients,
    tp_group: Group,
    pp_group: Group = None,
) -> torch.Tensor:
    """Return the 2-norm over the full parameters, a 0-dim float64 tensor, the same on every rank.

    A shard counts on its own rank. A replicated parameter counts on tensor-parallel rank 0 only. A shard with several
    copies (a tied embedding, too) counts on the rank with the first copy. Call this function after the gradients are
    summed over data-parallel ranks and over the stages of tied weights.

    Args:
        parameters: of this rank, by name.
        gradients: in the shapes of the parameters.
        tp_group, pp_group: the ranks that hold the other parts of the model.

    Communication:
        One all-reduce of 8 bytes over each group that is given.
    """
    own = {name: gradients[parameter] for name, parameter in parameters.items()}
    squares = sum_of_counted_squares(parameters, own, group_rank(tp_group))
    for group in (tp_group, pp_group):
        sum_over_ranks_(squares, group)
    return squares.sqrt()


def sum_of_counted_squares(
    parameters: Mapping[str, nn.Parameter],
    gradients: Mapping[str, torch.Tensor],
    tp_rank: int,
    rows: Rows = WHOLE_ROWS,
) -> torch.Tensor:
    """Return this rank's part of the square of the norm, a 0-dim float64 tensor on the device of the parameters.

    The parts of all ranks that hold other shards, other stages or own other rows add up to the square of
    global_gradient_norm.

    Args:
        parameters: of this rank, by name.
        gradients: by the same names, in the rows that this rank owns.
        tp_rank: of this rank in its tensor-parallel group; it counts for dense parameters.
        rows: the rows that this rank owns.
    """
    counted: list[torch.Tensor] = []
    for name, parameter in parameters.items():
        parts = _counted(parameter, parameter_parts(parameter), parameter.shape, tp_rank)
        counted += [part.of(gradients[name]) for part in rows.of(parameter).own_parts(parameter, parts)]
    if not counted:
        return torch.zeros((), dtype=torch.float64, device=next(iter(parameters.values())).device)
    return ops.sum_of_squares(counted)


def clip_coefficient(norm: float, clip_norm: float) -> float:
    """Return the factor that clips gradients, at most 1; clip_norm 0 means no clipping. As torch's clip_grad_norm_."""
    return min(1.0, clip_norm / (norm + 1e-6)) if clip_norm > 0 else 1.0


def clip_coefficient_on_device(norm: torch.Tensor, clip_norm: float) -> torch.Tensor:
    """Return clip_coefficient(norm, clip_norm) as a 0-dim float32 tensor; the host does not wait for the norm.

    Args:
        norm: 0-dim float64.
        clip_norm: as clip_coefficient.
    """
    if clip_norm <= 0:
        return torch.ones_like(norm, dtype=torch.float32)
    return (clip_norm / (norm + 1e-6)).clamp(max=1.0).float()


def non_finite_gradients(gradients: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of gradients that have a NaN or an infinity."""
    return [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]


def _counted(
    parameter: nn.Parameter, parts: tuple[ShardPart, ...], local_shape: Sequence[int], tp_rank: int
) -> list[ShardPart]:
    """Return the parts of a parameter that this rank counts: first copies of shards, and on rank 0 full parameters.

    Rank 0 is the first of the ranks that hold the other shards: tensor-parallel ranks, or those that share an expert. A
    full parameter is one that has the full shape, marked replicated or not: a layer without a group (BERT's head of two
    features) is full and not marked.
    """
    experts = parameter_record(parameter).experts
    rank = tp_rank if experts is None else group_rank(experts.etp_group)
    return [part for part in parts if part.shard.copy == 0 and (rank == 0 or not part.is_full(local_shape))]


def _counted_gradients(model: nn.Module, tp_rank: int) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yield the parts of the gradients in `grad` that this rank counts, and whether they belong to experts."""
    for parameter, parts in parts_of_parameters(model).items():
        gradient = parameter.grad
        if gradient is None:
            continue
        counted = _counted(parameter, parts, gradient.shape, tp_rank)
        of_expert = parameter_record(parameter).experts is not None
        # A gradient that counts as a whole is not cut, since FSDP2 would gather it for that.
        for each in [gradient] if len(counted) == len(parts) else [part.of(gradient) for part in counted]:
            yield each, of_expert


def _counted_rows(
    model: nn.Module, tp_rank: int, own: Mapping[nn.Parameter, torch.Tensor], rows: Rows
) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yield the parts that this rank counts of the gradients of its rows, and whether they belong to experts.

    torch takes no norm of an empty tensor.
    """
    for parameter, parts in parts_of_parameters(model).items():
        if parameter in own:
            counted = _counted(parameter, parts, parameter.shape, tp_rank)
            of_expert = parameter_record(parameter).experts is not None
            found = [part.of(own[parameter]) for part in rows.of(parameter).own_parts(parameter, counted)]
            yield from [(part, of_expert) for part in found if part.numel()]
