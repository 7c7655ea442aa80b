"""A model and its optimizer as named boxes of full tensors: what a checkpoint stores, whatever the layout."""

from collections.abc import Mapping

import torch
from torch import nn

from fused_megatron.tensor_parallel import parameter_shard
from fused_megatron.training.checkpoint import TensorBox
from fused_megatron.training.optimizer import Optimizer


def parameter_boxes(model: nn.Module) -> dict[str, TensorBox]:
    """Every parameter under `model.<name>`."""
    return {f"model.{name}": _box(p, p.detach()) for name, p in model.named_parameters()}


def optimizer_boxes(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, TensorBox]:
    """Moments and main weights under `optimizer.<kind>.<name>`, cut as the parameter is."""
    return {
        f"optimizer.{kind}.{name}": _box(parameters[name], tensor)
        for name, tensors in optimizer.state().items()
        for kind, tensor in tensors.items()
    }


def _box(parameter: nn.Parameter, tensor: torch.Tensor) -> TensorBox:
    """The part of `tensor` (shaped like the shard) that exists in the full tensor: no vocabulary padding."""
    shard = parameter_shard(parameter)
    real = shard.real_shape(tuple(tensor.shape))
    return TensorBox(tensor[tuple(slice(size) for size in real)], shard.full_shape, shard.offset)
