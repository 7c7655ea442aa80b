"""Full states of an optimizer whose parameters are shards: gathering them, and loading them into the shards."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.collectives import group_rank
from fused_megatron.interop.full_state import is_transposed
from fused_megatron.sharding import full_shape, full_tensor, mark_all_shards, own_shard, parallel_group


def full_optimizer_state_dict(model: nn.Module, optimizer: Any, *, rank0_only: bool = False) -> dict[str, Any]:
    """Gather the state_dict that an optimizer would have without parallelize.

    Args:
        model: after parallelize, with the parameters of the optimizer.
        optimizer: a torch optimizer that works element by element (AdamW, SGD), or a ShardedOptimizer, which has its
            own form for any layout.
        rank0_only: only rank 0 of the ranks that share the weights keeps tensors; the others return an empty dict. All
            ranks must call.

    Raises:
        InputError: the optimizer keeps sums over a parameter (Adafactor), which are wrong for a shard.

    Communication: two all-gathers for each tensor of the state.
    Memory: one full tensor on the model's device, and the whole state on the CPU.
    """
    if hasattr(optimizer, "load_full_state_dict"):
        state: dict[str, Any] = optimizer.full_state_dict(rank0_only=rank0_only)
        return state
    tp_group = parallel_group(model)
    keeps = not rank0_only or group_rank(tp_group) == 0
    mark_all_shards(model)
    transposed = is_transposed(model)
    found = optimizer.state_dict()
    for index, parameter in _members(optimizer, found):
        turned = transposed.get(parameter, False)
        own = dict(found["state"].get(index, {}))
        for key, value in own.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                if value.shape != parameter.shape:
                    raise InputError(
                        f"{type(optimizer).__name__}: {key} has the shape {tuple(value.shape)} for a parameter of "
                        f"shape {tuple(parameter.shape)}: it is computed from a shard, and differs from the full "
                        "parameter's (AdamW, SGD and other elementwise optimizers update shards as full tensors)"
                    )
                full = full_tensor(parameter, value, tp_group, turned)
                own[key] = full.cpu() if keeps else full.new_empty(0)
        if own:
            found["state"][index] = own
    return found if keeps else {}


def load_full_optimizer_state_dict(model: nn.Module, optimizer: Any, state: Mapping[str, Any]) -> None:
    """Load what full_optimizer_state_dict returned, or the state_dict of one process; each rank keeps its shards.

    Args:
        model: after parallelize, with the parameters of the optimizer.
        optimizer: with the same groups of parameters.
        state: the same on every rank.

    Raises:
        InputError: a tensor with another shape than the full parameter; nothing was loaded.
    """
    if hasattr(optimizer, "load_full_state_dict"):
        optimizer.load_full_state_dict(state)
        return
    mark_all_shards(model)
    transposed = is_transposed(model)
    shards = {**state, "state": dict(state["state"])}
    for index, parameter in _members(optimizer, state):
        turned = transposed.get(parameter, False)
        own = dict(state["state"].get(index, {}))
        for key, value in own.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                wanted = full_shape(parameter, turned)
                if tuple(value.shape) != wanted:
                    raise InputError(
                        f"{key} of parameter {index}: shape {tuple(value.shape)} in the optimizer's state must be "
                        f"{wanted}, the full parameter's (full_optimizer_state_dict gathers full states)"
                    )
                own[key] = own_shard(parameter, value, turned)
        if own:
            shards["state"][index] = own
    optimizer.load_state_dict(shards)


def _members(optimizer: Any, state: Mapping[str, Any]) -> Iterator[tuple[int, nn.Parameter]]:
    """Yield the index in a state_dict, and the parameter, of each member of an optimizer's groups."""
    saved, own = state["param_groups"], optimizer.param_groups
    counts = [[len(group["params"]) for group in groups] for groups in (saved, own)]
    if counts[0] != counts[1]:
        raise InputError(
            f"the state has groups of {counts[0]} parameters, and the optimizer of {counts[1]} (make the optimizer as "
            "when the state was saved)"
        )
    for saved_group, own_group in zip(saved, own, strict=True):
        yield from zip(saved_group["params"], own_group["params"], strict=True)
