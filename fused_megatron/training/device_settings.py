"""Precision of a run: the dtype of its weights on this device, and of products of float32 tensors."""

from collections.abc import Callable

import torch

from fused_megatron.config import TrainConfig
from fused_megatron.config.training import AUTO


def on_device(config: TrainConfig, device_type: str, say: Callable[[str], None] = lambda line: None) -> TrainConfig:
    """Return the config with the values that the device decides, and set torch's precision of float32 products.

    Args:
        config: of the run.
        device_type: "cuda" or "cpu".
        say: gets a line if the run has other weights than float32 without having asked for them.
    """
    found = config.for_device(device_type)
    if config.training.dtype == AUTO and found.training.weight_dtype != "float32":
        say(
            f"weights and activations in {found.training.weight_dtype}, as training.dtype={AUTO} on a GPU; gradients "
            "and main weights in float32 (--training.dtype float32 for all of them)"
        )
    if found.training.matmul_precision is not None:
        torch.set_float32_matmul_precision(found.training.matmul_precision)
    return found
