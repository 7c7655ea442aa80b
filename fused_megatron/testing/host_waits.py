"""Waits of the host for a GPU, found on the meta device, which stands for the GPU."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PACKAGE = str(Path(__file__).parents[1])
_READS = torch.ops.aten._local_scalar_dense.default
_WAITS = ("aten::nonzero", "aten::is_nonzero", "aten::masked_select")
_FROM_LISTS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)  # no dispatch mode sees their copies
_TAKE_HOST_TENSORS = ("fused_megatron::attention_forward", "fused_megatron::attention_backward")
"""Ops whose lengths of documents are in host memory."""
_COPIES = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}
"""Ops that copy between devices, with the position of the source among their arguments."""


class HostWaits(TorchDispatchMode):
    """Dispatch mode that finds the places at which the host would wait for a GPU.

        with HostWaits() as waits:
            loss = model(tokens.to("meta"), targets.to("meta"))
        assert waits.places == []

    The host waits if it reads a value, if the shape of a result depends on values, if a tensor is made from a list on
    the device, and at a copy between host and device unless it is non-blocking and the host memory is pinned. A value
    that the host reads is 0.

    Attributes:
        places: "op in file:line" of the package for each wait, in the order of the run.
        sent, fetched: number of copies to the device and back for which the host does not wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.sent = self.fetched = 0
        self._pinned: list[torch.Tensor] = []
        self._from_lists = _FromLists(self._found)

    def __enter__(self) -> "HostWaits":
        super().__enter__()
        self._from_lists.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._from_lists.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.is_pinned.default:
            return self._is_pinned(args[0])
        if func is torch.ops.aten._pin_memory.default:  # a build without CUDA cannot pin
            shape, strides = args[0].shape, args[0].stride()  # as torch, with the gaps of a view
            pinned = torch.empty_strided(shape, strides, dtype=args[0].dtype).copy_(args[0])
            self._pinned.append(pinned)
            return pinned
        if func is _READS and args[0].is_meta:
            self._found(func._schema.name)
            return 0 if not args[0].is_floating_point() else 0.0
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            self._copied(func, kwargs, to_host=True, pinned=True)
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func._schema.name in _WAITS and args[0].is_meta:
            self._found(func._schema.name)
        outputs = func(*args, **kwargs)
        options = _options(args, kwargs) if func is torch.ops.aten.copy_.default else kwargs
        tensors = [x for x in tree_leaves((args, kwargs, outputs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.dim() or func in _COPIES}
        if devices > {"meta"} and func.name() not in _TAKE_HOST_TENSORS:
            self._copied(func, options, func in _COPIES and self._is_pinned(args[_COPIES[func]]))
        return outputs

    def _copied(self, func: Any, kwargs: Any, pinned: bool, to_host: bool = False) -> None:
        if not (pinned and kwargs.get("non_blocking")):
            self._found(func._schema.name)
        elif to_host:
            self.fetched += 1
        else:
            self.sent += 1

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is dense in memory that was pinned: torch copies others by way of other memory."""
        pinned = {each.untyped_storage().data_ptr() for each in self._pinned}
        return tensor.is_cpu and tensor.is_contiguous() and tensor.untyped_storage().data_ptr() in pinned

    def _found(self, name: str) -> None:
        own = [f for f in traceback.extract_stack() if f.filename.startswith(_PACKAGE) and f.filename != __file__]
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "the caller"
        self.places.append(f"{name} in {where}")


class _FromLists(TorchFunctionMode):
    """Function mode that finds tensors made from host values on the device."""

    def __init__(self, found: Callable[[str], None]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _FROM_LISTS and result.is_meta:
            self._found(func.__name__)
        return result


def _options(args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the options of copy_(to, from, non_blocking)."""
    return {"non_blocking": args[2], **kwargs} if len(args) > 2 else kwargs
