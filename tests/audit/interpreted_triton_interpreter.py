"""Tests of audit/triton_interpreter.py in a process with TRITON_INTERPRET=1; test_triton_interpreter.py runs them."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from fused_megatron.audit.triton_interpreter import interpreter


@triton.jit
def _copy(source, result, num, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + offsets, mask=offsets < num)
    tl.store(result + offsets + SHIFT, x.to(result.dtype.element_ty), mask=offsets < num)


@triton.jit
def _last_program(result):
    tl.store(result, tl.program_id(0) * 100 + tl.program_id(1))


@triton.jit
def _visit(result):
    cell = result + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(cell, tl.load(cell) + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,)).to(torch.int32)
    source = torch.cat((bits.view(torch.float32), torch.randn(4096), torch.tensor([torch.inf, -torch.inf, torch.nan])))
    with interpreter():
        result = torch.empty(source.shape, dtype=dtype)
        _copy[(triton.cdiv(len(source), 1024),)](source, result, len(source), SHIFT=0, BLOCK=1024)
    torch.testing.assert_close(result, source.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_write_beyond_a_tensor_is_found(shift: int) -> None:
    with interpreter(), pytest.raises(InterpreterError, match="_copy writes 4 bytes outside of its tensors"):
        _copy[(1,)](torch.randn(10), torch.empty(10), 10, SHIFT=shift, BLOCK=16)


def test_a_read_beyond_a_tensor_is_found() -> None:
    with interpreter(), pytest.raises(InterpreterError, match="_copy reads 8 bytes outside of its tensors"):
        _copy[(1,)](torch.randn(8), torch.empty(10), 10, SHIFT=0, BLOCK=16)


def test_bytes_are_counted_without_masked_elements() -> None:
    with interpreter() as accesses:
        _copy[(2,)](torch.randn(20), torch.empty(20, dtype=torch.float16), 20, SHIFT=0, BLOCK=16)
    assert accesses.bytes == {("_copy", "load"): 80, ("_copy", "store"): 40}


def test_only_the_last_programs() -> None:
    with interpreter(grid_seed=3, last_programs=2):
        visited = torch.zeros(5, 7)
        _visit[(5, 7)](visited)
    assert visited.sum() == 2 and visited[3, 6] == visited[4, 6] == 1


def test_every_program_runs_once_in_another_order() -> None:
    last = []
    for seed in range(8):
        with interpreter(grid_seed=seed):
            visited, result = torch.zeros(5, 7), torch.zeros(1)
            _visit[(5, 7)](visited)
            _last_program[(5, 7)](result)
        assert torch.equal(visited, torch.ones(5, 7))
        last.append(result.item())
    assert len(set(last)) > 1  # a race that the usual order hides
