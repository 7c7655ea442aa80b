"""Names and boxes of a model's and an optimizer's tensors in a checkpoint, the same in every layout."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fused_megatron.sharding import WHOLE_ROWS, Rows, ShardPart, TensorBox


def parameter_boxes(
    parameters: Mapping[str, nn.Parameter],
    own: Mapping[str, torch.Tensor] | None = None,
    rows: Rows = WHOLE_ROWS,
) -> dict[str, TensorBox]:
    """Return the box of every parameter under `model.<name>`; a stacked parameter has a box `model.<name>.<part>` each.

    Every pipeline stage uses the names of the whole model, so that a checkpoint of any stage cut fits any other cut.
    Each expert has names of its own, so that a checkpoint fits any number of expert-parallel ranks.

    Args:
        parameters: by their names in the whole model.
        own: the rows of each parameter that this rank owns, by the same names; None: whole parameters.
        rows: the numbers of these rows.
    """
    boxes: dict[str, TensorBox] = {}
    for name, parameter in parameters.items():
        tensor = parameter.detach() if own is None else own[name]
        boxes |= _boxes(f"model.{name}", rows.of(parameter).own_parts(parameter), tensor)
    return boxes


def buffer_boxes(model: nn.Module) -> dict[str, TensorBox]:
    """Return the box of every buffer that belongs to the model's state, under `model.<name>`.

    Buffers are whole, and the same on every rank that has them.
    """
    boxes = {}
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                full_name = f"model.{path}.{name}" if path else f"model.{name}"
                boxes[full_name] = TensorBox(buffer, tuple(buffer.shape), (0,) * buffer.dim())
    return boxes


def optimizer_boxes(
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Mapping[str, torch.Tensor]],
    rows: Rows = WHOLE_ROWS,
) -> dict[str, TensorBox]:
    """Return the boxes of moments and main weights under `optimizer.<kind>.<name>`, cut like their parameter.

    Args:
        parameters: by their names in the whole model.
        state: tensors by parameter name and kind, as returned by data_parallel.Optimizer.state().
        rows: the rows of each parameter that the state belongs to.
    """
    boxes: dict[str, TensorBox] = {}
    for name, tensors in state.items():
        for kind, tensor in tensors.items():
            boxes |= _boxes(f"optimizer.{kind}.{name}", rows.of(parameters[name]).own_parts(parameters[name]), tensor)
    return boxes


def _boxes(name: str, parts: Sequence[ShardPart], tensor: torch.Tensor) -> dict[str, TensorBox]:
    """Return the boxes of the parts of `tensor` in their full tensors, without vocabulary padding."""
    return {part.full_name(name): part.held(tensor) for part in parts}
