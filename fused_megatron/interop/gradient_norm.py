"""The gradient norm of a model of which a rank holds shards: what torch's own sees is one rank's part of it."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fused_megatron.collectives import Group
from fused_megatron.collectives.transfers import start_all_gather
from fused_megatron.interop.full_state import parallel_group
from fused_megatron.tensor_parallel import ParameterShard, ShardedModule


def clip_grad_norm_(
    model: nn.Module, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> torch.Tensor:
    """torch.nn.utils.clip_grad_norm_ of all gradients of a model, with tensor-parallel layers or without.

    torch's own function sees this rank's shards alone: it returns another norm on every rank, by which ranks would
    scale what they share differently. This one counts every number of the whole model once. All ranks must call it.

    Args:
        model: after parallelize, or with layers of fused_megatron.tensor_parallel; FSDP2's fully_shard around it too.
        max_norm: gradients are scaled so that their norm is at most this.
        norm_type: p; inf for the largest absolute value.
        error_if_nonfinite: raise where the norm is nan or inf.

    Returns:
        The norm before, a scalar, the same on every tensor-parallel rank.

    Raises:
        RuntimeError: the norm is not finite, with error_if_nonfinite; gradients are as they were.

    Communication: one all-gather of a number; with FSDP2 what its own norms need.
    """
    sharded, whole = _gradients(model)
    group = parallel_group(model)
    norms = [_norm(gradients, norm_type, model) for gradients in (sharded, whole)]
    all_sharded = _of_all(norms[0], group)
    total = torch.linalg.vector_norm(torch.cat([all_sharded, norms[1].view(1)]), norm_type)
    if error_if_nonfinite and not math.isfinite(total.item()):
        raise RuntimeError(f"the gradient norm of order {norm_type} is {total.item()}, and cannot be clipped")
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, total)
    return total


def _gradients(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(those that this rank counts of its shards, those that are whole on every rank)."""
    # Marks are the modules', since FSDP2 and moves make new parameters.
    shards: dict[torch.Tensor, ParameterShard] = {}
    for module in model.modules():
        if isinstance(module, ShardedModule):
            for name, shard in module._shards.items():
                first = shard if isinstance(shard, ParameterShard) else shard[0].shard
                shards[module.get_parameter(name)] = first
    sharded, whole = [], []
    for parameter in model.parameters():
        shard_of = shards.get(parameter)
        if parameter.grad is None:
            continue
        if shard_of is None or shard_of.replicated:
            whole.append(parameter.grad)
        elif shard_of.copy == 0:
            sharded.append(parameter.grad)
    return sharded, whole


def _norm(gradients: Iterable[torch.Tensor], norm_type: float, model: nn.Module) -> torch.Tensor:
    """A float32 scalar; over FSDP2's ranks too."""
    norm: Any = torch.nn.utils.get_total_norm(list(gradients), norm_type)
    whole: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return whole.to(device, torch.float32)


def _of_all(norm: torch.Tensor, group: Group) -> torch.Tensor:
    return start_all_gather(norm.view(1), 0, group).wait()
