"""Triton's interpreter with checks that find faults of kernels on a machine without a GPU.

As shipped (3.9) the interpreter truncates float32 to bfloat16 where a GPU rounds to nearest, allows accesses outside of
the tensors, and runs the programs of a grid in order. With interpreter() bfloat16 is rounded, every access is checked
against the tensors of the launch, and the order can be permuted.

The environment of the process must contain TRITON_INTERPRET=1 before triton is imported.
"""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def interpreter(grid_seed: int | None = None, *, last_programs: int | None = None) -> Iterator["Accesses"]:
    """Run kernels with bfloat16 rounded as on a GPU, every access checked, and the grid in a random order.

    Args:
        grid_seed: seed of the order of programs; results must be the same, bit for bit, for any seed. None: in order.
        last_programs: run only this many programs at the end of each grid, so that a tensor of more than 2^31 elements
            needs few of its pages.

    Yields:
        The accesses of the kernels that run inside.

    Raises:
        triton's InterpreterError: a kernel reads or writes outside of its tensors.
    """
    from triton.runtime import interpreter as triton_interpreter  # noqa: PLC0415  triton is optional

    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before triton is imported"
    builder = triton_interpreter.InterpreterBuilder
    executor = triton_interpreter.GridExecutor
    accesses = Accesses()
    replaced: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, make(getattr(owner, name)))

    replace(builder, "cast_impl", _rounding_cast)
    replace(builder, "create_masked_load", accesses.watch("load"))
    replace(builder, "create_masked_store", accesses.watch("store"))
    replace(executor, "_init_args_hst", accesses.watch_arguments)
    grid = _Grid(grid_seed, last_programs)
    replace(builder, "set_grid_dim", lambda _: lambda self, *sizes: grid.set_dim(self))
    replace(builder, "set_grid_idx", lambda _: lambda self, i, *_: grid.set_index(self, i))
    patched: set[int] = set()
    replace(triton_interpreter, "_patch_lang", lambda patch: _once_a_launch(patch, patched))
    replace(triton_interpreter, "_patch_lang_tensor", _with_bounds_of_loops)
    replace(executor, "__call__", lambda call: _launch(call, grid, accesses, patched))
    try:
        yield accesses
    finally:
        for owner, name, original in reversed(replaced):
            setattr(owner, name, original)


class Accesses:
    """Checks each access of interpreted kernels, and adds up their bytes.

    Attributes:
        bytes: by (kernel, "load" or "store"), bytes of all programs, without masked elements.
    """

    def __init__(self) -> None:
        self.bytes: dict[tuple[str, str], int] = {}
        self.kernel = ""
        self._ranges: list[tuple[int, int]] = []

    def watch(self, kind: str) -> Callable[[Any], Any]:
        """Return a wrapper for the interpreter's masked load or store."""

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def access(builder: Any, pointers: Any, *args: Any) -> Any:
                mask = args[0] if kind == "load" else args[1]
                width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
                self._see(kind, pointers.data, mask.data, width)
                return original(builder, pointers, *args)

            return access

        return make

    def watch_arguments(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the step that passes the tensors to a launch."""

        def init(executor: Any, args: Any, kwargs: Any) -> Any:
            tensors = [x for x in (*args, *kwargs.values()) if hasattr(x, "untyped_storage")]
            storages = [x.untyped_storage() for x in tensors]
            self._ranges = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages})
            return original(executor, args, kwargs)

        return init

    def _see(self, kind: str, pointers: Any, mask: Any, width: int) -> None:
        import numpy as np  # noqa: PLC0415  imported with triton: only the interpreter needs it

        addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        if addresses.size == 0:
            return
        key = (self.kernel, kind)
        self.bytes[key] = self.bytes.get(key, 0) + addresses.size * width
        low, high = int(addresses.min()), int(addresses.max()) + width
        if any(begin <= low and high <= end for begin, end in self._ranges):
            return
        begins = np.array([begin for begin, _ in self._ranges], dtype=np.int64)
        ends = np.array([end for _, end in self._ranges], dtype=np.int64)
        owner = np.searchsorted(begins, addresses, side="right") - 1
        outside = addresses[(owner < 0) | (addresses + width > ends[owner])]
        if outside.size > 0:
            verb = {"load": "reads", "store": "writes"}[kind]
            raise AssertionError(f"{self.kernel} {verb} {outside.size * width} bytes outside of its tensors")


def _once_a_launch(patch: Callable[..., Any], patched: set[int]) -> Callable[..., Any]:
    """Let the interpreter patch the language once per launch instead of at every call of a function."""

    def patch_once(function: Any) -> Any:
        key = id(function.__globals__)
        if key in patched:
            return None
        patched.add(key)
        return patch(function)

    return patch_once


def _launch(call: Callable[..., Any], grid: "_Grid", accesses: Accesses, patched: set[int]) -> Callable[..., Any]:
    def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()  # the previous launch has removed its patches
        accesses.kernel = executor.fn.__name__
        executor.grid = grid.of_launch(executor.grid)
        return call(executor, *args, **kwargs)

    return launch


class _Grid:
    """Selection and order of a launch's programs: maps the interpreter's count 0, 1, 2, .. to program ids."""

    def __init__(self, seed: int | None, last_programs: int | None) -> None:
        self._rng = None if seed is None else random.Random(seed)
        self._last = last_programs
        self._sizes = (1, 1, 1)
        self._order: list[int] = []

    def of_launch(self, grid: Any) -> Callable[[Any], tuple[int]]:
        """Return a one-dimensional grid with the selected number of programs, to launch instead of `grid`."""

        def count(arguments: Any) -> tuple[int]:
            x, y, z = [*(grid(arguments) if callable(grid) else grid), 1, 1][:3]
            self._sizes = (x, y, z)
            first = max(0, x * y * z - self._last) if self._last else 0
            chosen = range(first, x * y * z)
            self._order = list(chosen) if self._rng is None else self._rng.sample(chosen, len(chosen))
            return (len(chosen),)

        return count

    def set_dim(self, builder: Any) -> None:
        builder.grid_dim = self._sizes

    def set_index(self, builder: Any, i: int) -> None:
        x, y, _z = self._sizes
        program = self._order[i]
        builder.grid_idx = (program % x, program // x % y, program // (x * y))


def _with_bounds_of_loops(patch: Callable[..., None]) -> Callable[..., None]:
    """Let loops run to a computed bound: with Triton 3.6 and NumPy 2.4 an array of one element is no index."""

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch_tensor


def _rounding_cast(cast: Callable[..., Any]) -> Callable[..., Any]:
    import numpy as np  # noqa: PLC0415  imported with triton: only the interpreter needs it
    import triton.language as tl  # noqa: PLC0415
    from triton.runtime.interpreter import TensorHandle  # noqa: PLC0415

    def rounding_cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return TensorHandle(np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded), dst_type.scalar)

    return rounding_cast
