"""What the linear products share: operands that fit, autocast, the dim of the sequence."""

import torch

from fused_megatron.checks import InputError, check, check_same_device, check_shape, dtype_name
from fused_megatron.collectives import Group, group_size


def autocast_operands(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What torch's autocast would do to torch.nn.functional.linear, before the collective so that it moves less."""
    device_type = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device_type) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device_type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_operands(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise unless they fit each other as those of torch.nn.functional.linear."""
    check(weight.dim() == 2, f"weight.shape={tuple(weight.shape)} must be (out_features, in_features)")
    features = weight.shape[1]
    if x.dim() == 0 or x.shape[-1] != features:
        raise InputError(
            f"x.shape={tuple(x.shape)} must end in this rank's number of input features {features} "
            f"(weight.shape={tuple(weight.shape)})"
        )
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype != weight.dtype:
            raise TypeError(
                f"{name}.dtype={dtype_name(tensor.dtype)} must equal weight.dtype={dtype_name(weight.dtype)} "
                "(cast one of them, or use torch.autocast)"
            )
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1])
    check_same_device("x", x, "weight", weight)


def sharded_sequence_dim(x: torch.Tensor, sequence_parallel: bool, sequence_dim: int, tp_group: Group) -> int | None:
    """The dim of x that is sharded, as a number from 0; None without sequence parallelism."""
    if not sequence_parallel or group_size(tp_group) == 1:
        return None
    check(
        -x.dim() <= sequence_dim < x.dim() and sequence_dim % x.dim() != x.dim() - 1,
        f"sequence_dim={sequence_dim} must be a dim of x.shape={tuple(x.shape)} other than the last",
    )
    return sequence_dim % x.dim()
