"""A model and its optimizer as named boxes of full tensors: what a checkpoint stores, whatever the layout."""

from collections.abc import Mapping

import torch
from torch import nn

from fused_megatron.sharding import TensorBox, parameter_parts


def parameter_boxes(parameters: Mapping[str, nn.Parameter]) -> dict[str, TensorBox]:
    """Every parameter under `model.<name>`; one that stacks several full ones as `model.<name>.<part>` each.

    The names are those of the whole model in every pipeline stage, so that any cut into stages loads any other.
    """
    boxes: dict[str, TensorBox] = {}
    for name, parameter in parameters.items():
        boxes |= _boxes(f"model.{name}", parameter, parameter.detach())
    return boxes


def optimizer_boxes(
    parameters: Mapping[str, nn.Parameter], state: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, TensorBox]:
    """Moments and main weights under `optimizer.<kind>.<name>`, cut as the parameter is.

    state: by parameter name and kind, as data_parallel.Optimizer.state() gives it.
    """
    boxes: dict[str, TensorBox] = {}
    for name, tensors in state.items():
        for kind, tensor in tensors.items():
            boxes |= _boxes(f"optimizer.{kind}.{name}", parameters[name], tensor)
    return boxes


def _boxes(name: str, parameter: nn.Parameter, tensor: torch.Tensor) -> dict[str, TensorBox]:
    """What of `tensor` (shaped like the parameter) exists in the full tensors: no vocabulary padding."""
    return {part.full_name(name): part.held(tensor) for part in parameter_parts(parameter)}
