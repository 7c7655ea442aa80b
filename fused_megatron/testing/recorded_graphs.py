"""A stand-in for CUDA graphs on a CPU: recorded ops that run again on the same tensors."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HOST = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::lift_fresh")


class HostInGraphError(RuntimeError):
    """A capture reads a value, or copies one from the host, which a CUDA graph cannot do."""


class RecordedGraph(TorchDispatchMode):
    """Ops in their order, with the tensors that they read and wrote; it stands for a torch.cuda.CUDAGraph.

    replay() runs the ops again with the same numbers on the same tensors and writes the results into the memory of the
    recorded ones. What a CUDA graph forgets it forgets too: code of Python, numbers that Python computed, and hooks.

    Unlike a CUDA graph, the ops also run during the capture.
    """

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in _HOST:
            raise HostInGraphError(f"{func._schema.name} while a graph is captured")
        outputs = func(*args, **kwargs)
        if not func.is_view:
            self.ops.append((func, args, kwargs, tree_leaves(outputs)))
        return outputs

    @torch.no_grad()
    def replay(self) -> None:
        """Run the ops again."""
        for func, args, kwargs, recorded in self.ops:
            for old, new in zip(recorded, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and not _share_memory(old, new):
                    old.detach().copy_(new)


@contextmanager
def recorded_graphs() -> Iterator[None]:
    """Let torch.cuda.make_graphed_callables, torch's own code, make RecordedGraphs on a CPU."""
    with (
        patch("torch.cuda.CUDAGraph", RecordedGraph),
        patch("torch.cuda.graph", lambda graph, pool=None: graph),
        patch("torch.cuda.graphs.graph_pool_handle", lambda: None),
        patch("torch.cuda.synchronize", lambda *_: None),
        patch("torch.cuda.Stream", lambda *_: None),
        patch("torch.cuda.stream", lambda stream: nullcontext()),
    ):
        yield


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
