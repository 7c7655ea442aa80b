"""Parts that layer_norm and rms_norm share: argument checks, fake outputs, the gradient without y."""

import torch

from fused_megatron.checks import InputError, check_dtype, check_same_device, check_shape
from fused_megatron.ops.registration import FLOAT_DTYPES


def needs_reference(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> bool:
    """Return whether an argument is float64, which only the reference takes.

    Raises:
        InputError, TypeError: arguments that do not fit each other.
    """
    check_dtype("x", x, FLOAT_DTYPES)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise InputError(f"x.shape={tuple(x.shape)} must have a last dim of at least 1")
    has_float64 = x.dtype == torch.float64
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            if not isinstance(parameter, torch.Tensor):
                raise TypeError(
                    f"{name}={parameter!r:.40} must be a tensor or None: the call is (x, weight, ..), without the "
                    f"normalized_shape of torch, which is the last dim of x"
                )
            check_shape(name, parameter, x.shape[-1:])
            check_dtype(name, parameter, FLOAT_DTYPES)
            check_same_device(name, parameter, "x", x)
            has_float64 = has_float64 or parameter.dtype == torch.float64
    if residual is not None:
        check_shape("residual", residual, x.shape)
        check_dtype("residual", residual, (x.dtype, torch.float32, torch.float64))
        check_same_device("residual", residual, "x", x)
        has_float64 = has_float64 or residual.dtype == torch.float64
    return has_float64


def empty_or_like(x: torch.Tensor, needed: bool, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return the fake output of an optional result: like x if it is needed, else empty."""
    if not needed:
        return x.new_empty(0)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def gradient_without_y(
    dtotal: torch.Tensor, dx_dtype: torch.dtype, need_dx: bool, need_dresidual: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return (dx, dresidual) if nothing depends on y: both are the gradient of total."""
    return dtotal.to(dx_dtype) if need_dx else None, dtotal if need_dresidual else None
