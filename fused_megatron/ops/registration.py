"""Registration of ops with torch's dispatcher: schema, fake kernel, Triton launchers, and the reference as fallback."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from fused_megatron import extension
from fused_megatron.optional_packages import install_command

_LIBRARY = torch.library.Library("fused_megatron", "FRAGMENT")

# The dtypes that every op takes; float64 runs on the reference.
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRITON_LAUNCHERS: dict[str, Callable[..., Any]] = {}  # by name of the op
_LACK_TRITON: set[str] = set()  # ops whose GPU kernel is in Triton, where Triton is not installed


def define_op(schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define torch.ops.fused_megatron.<name> and return its overload.

    The compiled kernels register themselves for CPU and CUDA when the library loads; the reference runs on every other
    device.

    Args:
        schema: for example "bias_gelu_forward(Tensor x, Tensor? bias) -> Tensor". An argument declared as written,
            "Tensor(a!) x", gets a new version at each call, so that autograd refuses to use the overwritten values.
        reference: the op in plain PyTorch; same arguments and results.
        fake: same arguments; returns empty tensors of the right shape, dtype and device.
    """
    extension.load_library()
    name = schema.partition("(")[0]

    def without_kernel(*args: Any, **kwargs: Any) -> Any:
        listed = (each for arg in args for each in (arg if isinstance(arg, list | tuple) else [arg]))
        device_type = next(each.device.type for each in listed if isinstance(each, torch.Tensor))
        triton = device_type == "cuda" and name in _LACK_TRITON
        extension.warn_no_kernel(name, device_type, f"It needs Triton: {install_command('triton')}" if triton else None)
        return reference(*args, **kwargs)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, without_kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_megatron::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.fused_megatron, name).default
    written = [i for i, argument in enumerate(op._schema.arguments) if argument.is_write]
    if written:
        _count_versions(op, written)
    return op


def _count_versions(op: Any, written: list[int]) -> None:
    """Increment the versions of written arguments under the key ADInplaceOrView, as torch's own in-place ops do."""

    def count(keys: Any, *args: Any) -> Any:
        for i in written:
            torch.autograd.graph.increment_version(args[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

    _LIBRARY.impl(op._schema.name.partition("::")[2], count, "ADInplaceOrView", with_keyset=True)


def register_triton(name: str, module: str) -> None:
    """Register the function `name` of fused_megatron/kernels/<module>.py as the CUDA kernel of the op `name`.

    With TRITON_INTERPRET=1 it serves CPU tensors as well: Triton's interpreter runs the kernel on the host. The module
    is imported at the first call, so that importing the op does not import Triton.
    """
    if importlib.util.find_spec("triton") is None:
        _LACK_TRITON.add(name)
        return

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"fused_megatron.kernels.{module}"), name)(*args)

    TRITON_LAUNCHERS[name] = launch
    if torch.version.cuda is not None:
        _LIBRARY.impl(name, launch, "CUDA")
    if os.environ.get("TRITON_INTERPRET") == "1":
        _LIBRARY.impl(name, launch, "CPU")


def define_composed_op(schema: str, *, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an op that is composed of other ops, the same on every device, and return its overload.

    torch.compile does not trace the implementation, for example its loops over chunks.

    Args:
        schema: as for define_op.
        implementation: same arguments and results; calls ops that have kernels.
        fake: same arguments; returns empty tensors of the right shape, dtype and device.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_megatron::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fused_megatron, name).default
