"""Gathering of full tensors from shards, and cutting of shards from full tensors."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch

from fused_megatron.collectives import Group, group_size
from fused_megatron.collectives.transfers import start_all_gather
from fused_megatron.sharding.parameter_record import parameter_parts, parameter_record, update_record
from fused_megatron.sharding.parameter_shard import ShardPart


def full_shape(parameter: torch.Tensor, transposed: bool = False) -> tuple[int, ...]:
    """Return the shape of a parameter over all ranks.

    A parameter that stacks parts of several full parameters has the full ones stacked in dim 0. A parameter of experts
    has the stacks of all expert-parallel ranks, one after the other. A stored_shape in the record replaces this shape.

    Args:
        parameter: marked with its shard, or not sharded.
        transposed: the full tensor is [in, out] where the parameter is [out, in]; vectors stay as they are.
    """
    shape = parameter_record(parameter).stored_shape or _stacked_shape(parameter)
    return shape[::-1] if transposed else shape


def _stacked_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    parts, experts = parameter_parts(parameter), parameter_record(parameter).experts
    shape = parts[0].shard.full_shape
    if not parts[0].name:
        return shape
    return (_stacked_rows(parts) * (1 if experts is None else experts.ep_size), *shape[1:])


def full_numel(parameters: Iterable[torch.Tensor]) -> int:
    """Count the elements of the full parameters, over all tensor-parallel ranks and without padding."""
    return sum(prod(full_shape(parameter)) for parameter in parameters)


def full_tensor(
    parameter: torch.Tensor, values: torch.Tensor, tp_group: Group, transposed: bool = False
) -> torch.Tensor:
    """Gather a full tensor that is sharded as a parameter is: the parameter, its gradient, an optimizer's moment.

    Args:
        parameter: parameter of a parallel layer. If it is not sharded, the result is a copy of values.
        values: this rank's part, in the parameter's shape; any dtype.
        tp_group: the ranks, all of which must call; None for this rank only. For a parameter of experts its record
            has the ranks: all of them must call.
        transposed: as full_shape.

    Returns:
        A new tensor of full_shape, the same on every rank.

    Communication: two all-gathers: the shards, and their offsets. For experts two over each of their groups.
    Memory: all shards, padding included, beside the full tensor.
    """
    values, parts = values.detach(), parameter_parts(parameter)
    experts = parameter_record(parameter).experts
    groups: tuple[Group, ...] = (None if parts[0].shard.replicated else tp_group,)
    if experts is not None:
        groups = (experts.etp_group, experts.ep_group)
    whole = values.new_empty(_stacked_shape(parameter))
    held = [(parts, values)]
    if any(group_size(group) > 1 for group in groups):
        offsets = torch.tensor([part.shard.offset for part in parts], device=values.device).unsqueeze(0)
        shards = values.unsqueeze(0).contiguous()
        for group in groups:
            offsets = start_all_gather(offsets, 0, group).wait()
            shards = start_all_gather(shards, 0, group).wait()
        held = [
            (tuple(_moved(part, tuple(offset)) for part, offset in zip(parts, rank_offsets, strict=True)), shard)
            for rank_offsets, shard in zip(offsets.tolist(), shards.unbind(), strict=True)
        ]
    of_each_ep_rank = len(held) // (1 if experts is None else experts.ep_size)
    for rank, (rank_parts, shard) in enumerate(held):
        for mine, index in held_values(rank_parts, shard, rank // of_each_ep_rank):
            whole[index] = mine
    stored_shape = parameter_record(parameter).stored_shape
    if stored_shape is not None:
        return whole.view(stored_shape)
    return whole.t().contiguous() if transposed and whole.dim() == 2 else whole


def copy_shard_(parameter: torch.Tensor, full: Any, transposed: bool = False) -> None:
    """Write this rank's part of a full tensor into a parameter; padding becomes 0.

    Args:
        parameter: marked with its shard, or not sharded; changed in place, unseen by autograd.
        full: full_shape; a tensor, or an object that slices like one (weight_files.StoredWeight, safetensors'
            get_slice).
        transposed: as full_shape.
    """
    experts, stored_shape = parameter_record(parameter).experts, parameter_record(parameter).stored_shape
    if stored_shape is not None:
        full = _StackedExperts(full, stored_shape[1])
    held = list(held_values(parameter_parts(parameter), parameter.data, 0 if experts is None else experts.ep_rank))
    if sum(mine.numel() for mine, _ in held) != parameter.numel():
        parameter.data.zero_()
    for mine, index in held:
        if mine.numel():
            turned = transposed and mine.dim() == 2
            (mine.t() if turned else mine).copy_(full[index[::-1] if turned else index])


def own_shard(parameter: torch.Tensor, full: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """Return this rank's part of a full tensor that is sharded as a parameter is, such as an optimizer's moment.

    Args:
        parameter: marked with its shard, or not sharded; unchanged.
        full: full_shape; any dtype and device.
        transposed: as full_shape.

    Returns:
        A new tensor in the parameter's shape, in the dtype of `full`, on the parameter's device; on the device of
        `full` if the parameter is on the meta device.
    """
    device = full.device if parameter.is_meta else parameter.device
    shard = torch.empty(parameter.shape, dtype=full.dtype, device=device)
    record = parameter_record(parameter)
    update_record(shard, shard=record.shard, experts=record.experts, stored_shape=record.stored_shape)
    copy_shard_(shard, full, transposed)
    return shard


class _StackedExperts:
    """A tensor [E, rows, columns] for reading as [E rows, columns]; an index lies within the rows of one expert."""

    def __init__(self, full: Any, num_rows: int) -> None:
        self._full, self._num_rows = full, num_rows

    def __getitem__(self, index: tuple[slice, slice]) -> torch.Tensor:
        rows, columns = index
        expert, start = divmod(rows.start, self._num_rows)
        stop = start + rows.stop - rows.start
        assert stop <= self._num_rows
        block: torch.Tensor = self._full[slice(expert, expert + 1), slice(start, stop), columns]
        return block[0]


def _moved(part: ShardPart, offset: tuple[int, ...]) -> ShardPart:
    return replace(part, shard=replace(part.shard, offset=offset))


def _stacked_rows(parts: tuple[ShardPart, ...]) -> int:
    """Return the rows of the full parameters that a named stack of parts has."""
    return sum(part.shard.full_shape[0] for part in parts)


def held_values(
    parts: tuple[ShardPart, ...], values: torch.Tensor, ep_rank: int = 0
) -> Iterator[tuple[torch.Tensor, tuple[slice, ...]]]:
    """Yield for each part a view of its values without padding, and their index in the stacked full tensors.

    Args:
        parts: parts of a parameter.
        values: in the shape of the parameter.
        ep_rank: expert-parallel rank that has the values; the stacks of the ranks follow each other.
    """
    start = ep_rank * _stacked_rows(parts) if parts[0].name else 0
    for part in parts:
        held = part.held(values)
        yield held.tensor, held.box.slices((-start, *[0] * (values.dim() - 1)) if start else None)
        start += part.shard.full_shape[0] if part.name else 0
