"""Named ranges for Nsight Systems (NVTX) or torch's profiler: steps, pipeline actions, layers and collectives."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_megatron.observe.record_communication import transfer_of


class Marker(Protocol):
    """Begins and ends nested ranges."""

    def push(self, name: str) -> object:
        """Begin a range inside the current one."""

    def pop(self) -> object:
        """End the range that was begun last."""


class NvtxMarker:
    """Ranges of NVTX, which Nsight Systems shows."""

    push = staticmethod(torch.cuda.nvtx.range_push)
    pop = staticmethod(torch.cuda.nvtx.range_pop)


class ProfilerMarker:
    """Ranges of torch.profiler, for devices without NVTX; they are in the trace of `train --profile`."""

    def __init__(self) -> None:
        self._open: list[Any] = []

    def push(self, name: str) -> None:
        self._open.append(torch.profiler.record_function(name))
        self._open[-1].__enter__()

    def pop(self) -> None:
        self._open.pop().__exit__(None, None, None)


def marker_for(device: torch.device) -> Marker:
    """Return the marker for a device: NVTX on CUDA, else torch's profiler."""
    return NvtxMarker() if device.type == "cuda" else ProfilerMarker()


class NamedRanges:
    """Names the parts of a step: "step 7", "forward stage 0 microbatch 2", "blocks.3.attention", "all_reduce 2.1 MB".

    A layer has a range in each of its forwards, also in a recomputation. In a backward the action has a range, and
    torch's own ranges link each backward op to its forward (sequence numbers). A collective has a range around its
    start; NCCL marks its kernels itself.

    Args:
        modules: stages by any key; their submodules get ranges with their names.
        marker: begins and ends the ranges.
    """

    def __init__(self, modules: Mapping[Any, nn.Module], marker: Marker) -> None:
        self._marker = marker
        self._handles = []
        for stage in modules.values():
            for name, module in stage.named_modules():
                if name and not isinstance(module, nn.ModuleList | nn.ModuleDict):
                    self._handles.append(module.register_forward_pre_hook(self._opener(name)))
                    # Also after an error, so that ranges stay nested.
                    self._handles.append(module.register_forward_hook(self._end, always_call=True))

    @contextlib.contextmanager
    def range(self, name: str) -> Iterator[None]:
        """Name what happens in the context."""
        self._marker.push(name)
        try:
            yield
        finally:
            self._marker.pop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Name a step, and the collectives in it."""
        with self.range(f"step {number}"), _Collectives(self):
            yield

    def close(self) -> None:
        """Remove the hooks from the layers."""
        for handle in self._handles:
            handle.remove()

    def _opener(self, name: str) -> Any:
        def begin(*_: Any) -> None:
            self._marker.push(name)

        return begin

    def _end(self, *_: Any) -> None:
        self._marker.pop()


class _Collectives(TorchDispatchMode):
    def __init__(self, ranges: NamedRanges) -> None:
        super().__init__()
        self._ranges = ranges

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        found = transfer_of(func.overloadpacket.__name__, args)
        with self._ranges.range(f"{found.kind} {found.num_bytes / 1e6:.3g} MB, {len(found.group)} ranks"):
            return func(*args, **(kwargs or {}))
