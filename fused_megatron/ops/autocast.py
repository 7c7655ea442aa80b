"""Casts of operands under torch.autocast, for layers whose products torch does not see."""

import torch


def autocast_operands(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cast as torch's autocast does for torch.nn.functional.linear; before the collective, so that fewer bytes move."""
    device_type = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device_type) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device_type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
