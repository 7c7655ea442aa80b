"""Experts of a Hugging Face folder, stored one by one, under the names and shapes of the models that stack them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fused_megatron.interop.known_experts import WEIGHTS
from fused_megatron.weight_files import StoredWeight

# The names of a matrix of an expert, of which Mixtral has its own.
_MATRIX = re.compile(r"(.+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w3|w2)\.weight")
_KINDS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# The matrices of each expert whose rows follow each other in a weight of a model.
_STACKED = dict(zip(WEIGHTS, (("gate_proj", "up_proj"), ("down_proj",)), strict=True))


class StackedWeights:
    """A tensor [E, rows, columns] whose experts are stored apart; it is read by slices of its three dims.

    Args:
        experts: for each expert the stored matrices whose rows follow each other (gate and up).

    Memory: the result of a slice.
    """

    def __init__(self, experts: Sequence[Sequence[StoredWeight]]) -> None:
        self._experts = experts
        first = experts[0]
        self.shape = (len(experts), sum(weight.shape[0] for weight in first), *first[0].shape[1:])
        self.dtype = first[0].dtype

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        experts, rows, columns = (*index, *[slice(None)] * (3 - len(index)))
        first, stop, _ = rows.indices(self.shape[1])
        blocks = []
        for weights in self._experts[experts]:
            parts, start = [], 0
            for weight in weights:
                low, high = max(first, start) - start, min(stop, start + weight.shape[0]) - start
                if low < high:
                    parts.append(weight[slice(low, high), columns])
                start += weight.shape[0]
            blocks.append(torch.cat(parts))
        return torch.stack(blocks)


def stack_experts(model: nn.Module, tensors: Mapping[str, StoredWeight]) -> dict[str, Any]:
    """Return the tensors of a folder with the experts of each layer stacked, if the model stacks them.

    Args:
        model: a model of transformers.
        tensors: by name. The experts of a layer that are not complete, or have different shapes, stay as they are.
    """
    if not any(name.endswith(f".experts.{WEIGHTS[0]}") for name in model.state_dict(keep_vars=True)):
        return dict(tensors)
    found: dict[str, Any] = {}
    experts: dict[str, dict[tuple[int, str], str]] = {}
    for name in tensors:
        matrix = _MATRIX.fullmatch(name)
        if matrix is None:
            found[name.replace(".block_sparse_moe.", ".mlp.")] = tensors[name]
        else:
            layer, expert, kind = matrix.groups()
            experts.setdefault(layer, {})[int(expert), _KINDS.get(kind, kind)] = name
    for layer, names in experts.items():
        wanted = [(expert, kind) for expert in range(len(names) // 3) for kind in ("gate_proj", "up_proj", "down_proj")]
        shapes = {(kind, tensors[name].shape) for (_, kind), name in names.items()}
        if set(names) != set(wanted) or len(shapes) != 3:
            found |= {name: tensors[name] for name in names.values()}
            continue
        for weight, kinds in _STACKED.items():
            each = [[tensors[names[expert, kind]] for kind in kinds] for expert in range(len(names) // 3)]
            found[f"{layer}.mlp.experts.{weight}"] = StackedWeights(each)
    return found
