"""The contract of an op: properties that every op must have, whatever it computes.

A test file describes its op once and checks every clause:

    CONTRACT = Contract(bias_gelu, unfused, draw)

    @pytest.mark.parametrize("clause", CLAUSES)
    def test_contract(clause, device):
        CONTRACT.check(clause, device)

    @pytest.mark.parametrize("clause", CPU_CLAUSES)
    def test_contract_on_the_cpu(clause):
        CONTRACT.check(clause)
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_megatron.testing.op_gradients import (
    Inputs,
    Op,
    Upstream,
    as_list,
    assert_op_matches,
    is_leaf,
    output_and_gradients,
    outputs_of,
)
from fused_megatron.testing.poisoned_memory import PoisonedMemory

Shape = tuple[int, ...]
Sample = tuple[Inputs, Upstream]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_EACH_DTYPE = tuple(_DTYPES)

# Clauses for every device, and their dtypes. gradients_of_gradients also uses float64.
_ANYWHERE = {
    "strides": _EACH_DTYPE,
    "memory": _EACH_DTYPE,
    "twice": _EACH_DTYPE,
    "empty": ("bfloat16",),
    "no_grad": ("bfloat16",),
    "single_gradients": ("float32",),
    "gradients_of_gradients": ("float32",),
}
# Clauses checked only on the CPU: the integration with torch is the same on all devices, and threads are the CPU's.
_ON_THE_CPU = {
    "opcheck": ("float32",),
    "compile": ("float32",),
    "fake_tensors": ("bfloat16",),
    "threads": _EACH_DTYPE,
    "streaming": _EACH_DTYPE,
}
CLAUSES = [f"{name} {dtype}" for name, dtypes in _ANYWHERE.items() for dtype in dtypes]
CPU_CLAUSES = [f"{name} {dtype}" for name, dtypes in _ON_THE_CPU.items() for dtype in dtypes]


@dataclass(frozen=True)
class Contract:
    """An op, the same function in plain torch, and inputs for both.

    Attributes:
        op: called with the inputs; returns one or several tensors.
        unfused: the same function in plain torch, for any floating-point dtype; in float64 it defines the right result.
        draw: maps (shape, dtype) to inputs and upstream gradients on the CPU, the same at each call.
        shape: for most clauses: a few rows of a width that allows accesses of 16 bytes.
        odd: for clauses that need few elements: a width that does not allow wide accesses.
        empty: shapes without elements.
        wide: enough elements for several threads.
        streamed: a shape with results of 4 MiB or more, which CPU kernels write past the caches, and rows that do not
            depend on each other. None if no kernel does that.
        yardstick: as in assert_op_matches.
    """

    op: Op
    unfused: Op
    draw: Callable[[Shape, torch.dtype], Sample]
    shape: Shape = (5, 12, 52)
    odd: Shape = (3, 6)
    empty: tuple[Shape, ...] = ((0, 8), (3, 0, 8))
    wide: Shape = (300, 1500)
    streamed: Shape | None = None
    yardstick: torch.dtype | None = torch.float32

    def check(self, clause: str, device: str = "cpu") -> None:
        """Raise AssertionError unless the clause (one of CLAUSES or CPU_CLAUSES) holds."""
        name, dtype = clause.split()
        getattr(self, f"_{name}")(_DTYPES[dtype], device)

    def results(self, sample: Sample, op: Op | None = None) -> list[torch.Tensor]:
        """Return [every output, every gradient] of the op, or of another op."""
        return output_and_gradients(op or self.op, *sample)

    def sample(self, shape: Shape, dtype: torch.dtype, device: str) -> Sample:
        """Draw inputs and upstream gradients on a device."""
        inputs, dy = self.draw(shape, dtype)
        return [None if t is None else t.to(device) for t in inputs], [t.to(device) for t in as_list(dy)]

    def _strides(self, dtype: torch.dtype, device: str) -> None:
        """Inputs of any strides give the same bits as contiguous ones."""
        sample = self.sample(self.shape, dtype, device)
        strided = _each(sample, _strided_copy)
        _assert_same_bits(self.results(strided), self.results(sample))
        assert_op_matches(self.op, self.unfused, *strided, yardstick=self.yardstick)

    def _memory(self, dtype: torch.dtype, device: str) -> None:
        """The op reads and writes nothing outside its tensors, writes no input, and takes any alignment."""
        for skip in (0, 1):
            memory = PoisonedMemory()
            sample = self.sample(self.shape, dtype, device)
            placed = _each(sample, functools.partial(memory.place, skip=skip))
            assert_op_matches(self.op, self.unfused, *placed, yardstick=self.yardstick)
            memory.check()

    def _twice(self, dtype: torch.dtype, device: str) -> None:
        for shape in (self.shape, self.odd):
            sample = self.sample(shape, dtype, device)
            _assert_same_bits(self.results(sample), self.results(sample))

    def _empty(self, dtype: torch.dtype, device: str) -> None:
        """Inputs without elements give outputs and gradients of the right shape; gradients of parameters are 0."""
        for shape in self.empty:
            inputs, dy = self.sample(shape, dtype, device)
            actual = self.results((inputs, dy))
            wanted = [*as_list(dy), *(t for t in inputs if is_leaf(t))]
            assert [t.shape for t in actual] == [t.shape for t in wanted], shape
            assert not any(t.any() for t in actual[len(as_list(dy)) :])

    def _no_grad(self, dtype: torch.dtype, device: str) -> None:
        sample = self.sample(self.shape, dtype, device)
        with torch.no_grad():
            outputs = outputs_of(self.op, sample[0])
        assert not any(y.requires_grad for y in outputs)
        _assert_same_bits(outputs, self.results(sample)[: len(outputs)])

    def _single_gradients(self, dtype: torch.dtype, device: str) -> None:
        """If only one input requires a gradient, its gradient is the same as when all do."""
        inputs, dy = self.sample(self.shape, dtype, device)
        gradients = iter(self.results((inputs, dy))[len(as_list(dy)) :])
        for chosen, tensor in enumerate(inputs):
            if not is_leaf(tensor):
                continue
            leaves = [None if t is None else t.detach().clone() for t in inputs]
            leaf = tensor.detach().clone().requires_grad_()
            leaves[chosen] = leaf
            used = [
                pair for pair in zip(outputs_of(self.op, leaves), as_list(dy), strict=True) if pair[0].requires_grad
            ]
            torch.autograd.backward([y for y, _ in used], [upstream for _, upstream in used])
            assert leaf.grad is not None
            if leaf.dim() > 1:
                _assert_same_bits([leaf.grad], [next(gradients)])
            else:  # a sum over rows may have another order if it is the only gradient
                torch.testing.assert_close(leaf.grad, next(gradients), rtol=1e-5, atol=1e-5)

    def _gradients_of_gradients(self, dtype: torch.dtype, device: str) -> None:
        """float64 has derivatives of any order; the gradient of a kernel refuses to be differentiated again."""
        inputs, _ = self.sample(self.odd, torch.float64, device)
        wide: list[Any] = [t.double().requires_grad_() if is_leaf(t) else t for t in inputs]

        def op(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(outputs_of(self.op, tensors))

        assert torch.autograd.gradcheck(op, wide) and torch.autograd.gradgradcheck(op, wide)
        inputs, dy = self.sample(self.odd, dtype, device)
        leaves = [t.requires_grad_() if is_leaf(t) else t for t in inputs]
        upstream = [t.requires_grad_() for t in as_list(dy)]
        first = next(t for t in leaves if t is not None and t.requires_grad)
        (gradient,) = torch.autograd.grad(outputs_of(self.op, leaves), first, upstream, create_graph=True)
        try:
            gradient.sum().backward()
        except RuntimeError as error:
            assert "once_differentiable" in str(error), error
        else:
            raise AssertionError("a second derivative was not refused")

    def _opcheck(self, dtype: torch.dtype, device: str) -> None:
        """Every raw op that forward and backward call passes torch.library.opcheck, for several strides."""
        with _RawCalls() as raw:
            self.results(self.sample(self.odd, dtype, device))
        assert raw.calls, "no raw op was called"
        for op, args in raw.calls:
            torch.library.opcheck(op, args)
            # int64 tensors (positions, seeds) keep their strides: raw ops need them contiguous.
            strided = tuple(
                _strided_copy(a) if isinstance(a, torch.Tensor) and a.dtype != torch.int64 else a for a in args
            )
            torch.library.opcheck(op, strided, test_utils=("test_schema", "test_faketensor"))

    def _compile(self, dtype: torch.dtype, device: str) -> None:
        """torch.compile compiles the op between other ops without a graph break."""

        def step(first: torch.Tensor, *others: torch.Tensor | None) -> list[torch.Tensor]:
            return [y * 3 for y in outputs_of(self.op, (first * 2, *others))]

        sample = self.sample(self.odd, dtype, device)
        torch._dynamo.reset()  # earlier compilations count against torch's limit
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(self.results(sample, compiled), self.results(sample, step))

    def _fake_tensors(self, dtype: torch.dtype, device: str) -> None:
        sample = self.sample(self.odd, dtype, device)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = self.results(_each(sample, mode.from_tensor))
        real = self.results(sample)
        assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]

    def _threads(self, dtype: torch.dtype, device: str) -> None:
        """Results have the same bits for any number of threads."""
        sample = self.sample(self.wide, dtype, device)
        before = torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(self.results(sample))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            _assert_same_bits(other, results[0])

    def _streaming(self, dtype: torch.dtype, device: str) -> None:
        """Results that are written past the caches, for their size, have the same bits as smaller results."""
        if self.streamed is None:
            return
        sample = self.sample(self.streamed, dtype, device)
        rows = self.streamed[0]
        whole = self.results(sample)
        quarter = -(-rows // 4)
        for first in range(0, rows, quarter):
            part = slice(first, first + quarter)
            some = _each(sample, functools.partial(_part_of_rows, part=part, rows=rows))
            for mine, all_rows in zip(self.results(some), whole, strict=True):
                if all_rows.shape[0] == rows:
                    assert torch.equal(all_rows[part], mine)


class _RawCalls(TorchDispatchMode):
    """Records the calls of ops that are not part of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("aten", "prim"):
            assert not kwargs, "raw ops take positional arguments only"
            self.calls.append((func, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)))
        return func(*args, **(kwargs or {}))


def _each(sample: Sample, change: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
    inputs, dy = sample
    return [None if t is None else change(t) for t in inputs], [change(t) for t in as_list(dy)]


def _part_of_rows(tensor: torch.Tensor, part: slice, rows: int) -> torch.Tensor:
    return tensor[part] if tensor.shape[0] == rows else tensor


def _strided_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy with gaps in the last dim and, from 3 dims on, the first two dims swapped in memory."""
    if tensor.dim() == 0:
        return tensor
    sizes = [*tensor.shape[:-1], 2 * tensor.shape[-1]]
    swap = tensor.dim() > 2
    if swap:
        sizes[0], sizes[1] = sizes[1], sizes[0]
    buffer = torch.full(sizes, -1, dtype=torch.float64).to(tensor.dtype).to(tensor.device)
    if tensor.is_floating_point():
        buffer.fill_(torch.nan)
    view = (buffer.transpose(0, 1) if swap else buffer)[..., ::2]
    return view.copy_(tensor)


def _assert_same_bits(actual: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for index, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        assert torch.equal(a, w), f"result {index} differs by up to {(a.double() - w.double()).abs().max().item():.3e}"
