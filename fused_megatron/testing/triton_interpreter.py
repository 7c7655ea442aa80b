"""Triton's interpreter made trustworthy: kernels run on a machine without a GPU, and what hides there is brought out.

As shipped (3.9) it truncates float32 to bfloat16 where a GPU rounds to nearest, lets a kernel write beyond a buffer,
and runs the programs of a grid in order. Here bfloat16 is rounded, buffers lie between redzones, and the order is
permuted.

The interpreter has to be chosen before triton is imported, so that such tests run in a process of their own:
`run_tests_interpreted(path)` from the test suite; inside, `interpreter()` around the launches.
"""

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_REDZONE_BYTES = 4096


def run_tests_interpreted(path: Path, *pytest_arguments: str, timeout_s: float = 300.0) -> None:
    """Run pytest on a file in a process where triton interprets; AssertionError with its output unless all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *pytest_arguments, str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    output = done.stdout[-8000:] + done.stderr[-2000:]
    assert done.returncode == 0, f"{path.name} failed in Triton's interpreter:\n{output}"


@contextlib.contextmanager
def interpreter(grid_seed: int | None = None) -> Iterator[None]:
    """Run kernels with bfloat16 rounded as on a GPU, redzones around new tensors, and the grid in a random order.

    Args:
        grid_seed: None keeps the order of the grid; results must be the same, bit for bit, for any seed.

    Raises:
        AssertionError: at the end, when a redzone around a tensor allocated inside was written.
    """
    from triton.runtime.interpreter import InterpreterBuilder  # noqa: PLC0415  triton is no dependency of `testing`

    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before triton is imported"
    cast, set_grid_idx = InterpreterBuilder.cast_impl, InterpreterBuilder.set_grid_idx
    InterpreterBuilder.cast_impl = _rounding_cast(cast)
    if grid_seed is not None:
        InterpreterBuilder.set_grid_idx = _permuted(set_grid_idx, random.Random(grid_seed))
    guard = GuardedAllocations()
    try:
        with guard:
            yield
    finally:
        InterpreterBuilder.cast_impl, InterpreterBuilder.set_grid_idx = cast, set_grid_idx
    guard.check()


class GuardedAllocations(TorchFunctionMode):
    """Fills what torch.empty, empty_like and new_empty return with NaN, and puts it between two redzones."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like, torch.Tensor.new_empty):
            return self.guarded(result)
        return result

    def guarded(self, like: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
        """A contiguous tensor with the shape and dtype of `like` between redzones, holding `values` or poison."""
        num_bytes = like.numel() * like.element_size()
        buffer = torch.full((num_bytes + 2 * _REDZONE_BYTES,), 0xFF, dtype=torch.uint8)  # 0xFF...: NaN in every format
        self._buffers.append((buffer, num_bytes))
        inside = buffer[_REDZONE_BYTES : _REDZONE_BYTES + num_bytes].view(like.dtype).view(like.shape)
        return inside if values is None else inside.copy_(values)

    def check(self) -> None:
        """Raise AssertionError if a redzone was written."""
        for buffer, num_bytes in self._buffers:
            before, after = buffer[:_REDZONE_BYTES], buffer[_REDZONE_BYTES + num_bytes :]
            for name, zone in (("before", before), ("after", after)):
                written = int((zone != 0xFF).sum())
                assert written == 0, f"{written} bytes were written {name} a buffer of {num_bytes} bytes"


def _rounding_cast(cast: Callable[..., Any]) -> Callable[..., Any]:
    import numpy as np  # noqa: PLC0415  with triton: what only the interpreter needs
    import triton.language as tl  # noqa: PLC0415
    from triton.runtime.interpreter import TensorHandle  # noqa: PLC0415

    def rounding_cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return TensorHandle(np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded), dst_type.scalar)

    return rounding_cast


def _permuted(set_grid_idx: Callable[..., None], rng: random.Random) -> Callable[..., None]:
    orders: dict[tuple[int, ...], list[int]] = {}

    def set_permuted(self: Any, x: int, y: int, z: int) -> None:
        _, num_y, num_z = dim = tuple(self.grid_dim)
        if (x, y, z) == (0, 0, 0):  # a launch begins
            orders[dim] = rng.sample(range(dim[0] * num_y * num_z), dim[0] * num_y * num_z)
        place = orders[dim][(x * num_y + y) * num_z + z]
        set_grid_idx(self, place // (num_y * num_z), place // num_z % num_y, place % num_z)

    return set_permuted
