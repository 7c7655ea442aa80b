"""State of a torch optimizer of rows as full tensors by parameter name, which fits any layout."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.collectives import Group
from fused_megatron.collectives.together import gather_json
from fused_megatron.data_parallel.row_blocks import gather_whole
from fused_megatron.sharding import Replicas, Rows, full_shape, full_tensor, own_shard

OwnRows = Sequence[tuple[str, nn.Parameter, nn.Parameter]]
"""Name and parameter of a model, and this rank's main rows of it."""


def gather_state(
    state: Mapping[Any, Mapping[str, Any]], own: OwnRows, replicas: Replicas, tp_group: Group
) -> dict[str, dict[str, Any]]:
    """Gather the state of an optimizer. Every rank calls it.

    Args:
        state: by main rows; tensors in their shape are rows of a full tensor.
        own: main rows are state, too, where the parameter has a lower precision.
        replicas: ranks that own the other rows, and the rows that this rank owns.
        tp_group: ranks that hold the other shards of dense parameters.

    Returns:
        {"state": {name: {key: full tensor on the CPU, or a value}}, "by_rows": {name: keys of full tensors}}.

    Communication: for dense parameters and for experts an exchange of the keys; for each tensor one all-gather over the
        ranks that own the other rows, and those of full_tensor.
    """
    held = {name: {**state.get(main, {}), **({"main": main} if main.dtype != p.dtype else {})} for name, p, main in own}
    # A scalar of the optimizer looks like the row of a 0-dim parameter on the rank that owns it, and only there.
    mine = {name: [k for k, v in held[name].items() if _is_like(v, main)] for name, _, main in own}
    by_rows: dict[str, list[str]] = {}
    for each, members in replicas.split({name: p for name, p, _ in own}):
        gathered = gather_json({name: mine[name] for name in members}, each.shard_group)
        by_rows |= {name: [k for k in mine[name] if all(k in one[name] for one in gathered)] for name in members}
    found: dict[str, dict[str, Any]] = {}
    for name, parameter, _ in own:
        found[name], of_parameter = {}, replicas.of(parameter)
        for key, value in held[name].items():
            if key in by_rows[name]:
                shapes, rows = [parameter.shape], of_parameter.rows
                (value,) = gather_whole([value.detach()], shapes, rows, of_parameter.shard_group)
                value = full_tensor(parameter, value, tp_group).cpu()
            found[name][key] = value
    return {"state": found, "by_rows": by_rows}


def own_state(saved: Mapping[str, Any], own: OwnRows, rows: Rows) -> dict[str, dict[str, Any]]:
    """Cut this rank's rows out of what gather_state returned, in any layout.

    Raises:
        InputError: a tensor has another shape than its parameter.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, parameter, _ in own:
        found[name] = dict(saved["state"].get(name, {}))
        for key in saved["by_rows"].get(name, ()):
            full = found[name][key]
            wanted = full_shape(parameter)
            if tuple(full.shape) != wanted:
                raise InputError(f"{key} of {name}: shape {tuple(full.shape)} in the state must be {wanted}")
            found[name][key] = rows.of(parameter).own(own_shard(parameter, full)).clone()
    return found


def _is_like(value: Any, main: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == main.shape
