"""Start here when linear_cross_entropy fails under torch.compile, or keeps too much memory."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fused_megatron as fm
from fused_megatron.ops import linear_cross_entropy as registers  # noqa: F401
from fused_megatron.testing import run_on_ranks

_ops = torch.ops.fused_megatron
DTYPES = [torch.float32, torch.bfloat16]


def operands(dtype: torch.dtype, bias: bool = True) -> tuple[list[Any], torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 8).to(dtype), torch.randn(20, 8).to(dtype)
    inputs = [hidden, weight, torch.randn(20).to(dtype) if bias else None]
    return [x if x is None else x.requires_grad_() for x in inputs], torch.randint(0, 20, (9,))


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compile_as_one_graph(dtype: torch.dtype, reduction: str) -> None:
    inputs, target = operands(dtype)

    def step(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        loss = fm.ops.linear_cross_entropy(
            hidden * 2, weight, target, bias=bias, reduction=reduction, label_smoothing=0.1, chunk_tokens=4
        )
        return (loss * 0.7).float().sum()

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = call(*inputs)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, bias: bool) -> None:
    inputs, target = operands(dtype, bias)
    terms = fm.ops.LossTerms(20, label_smoothing=0.1, z_loss=1e-3)
    head = (*(x if x is None else x.detach() for x in inputs), target, 4, *terms.scalars())
    needs, no_gradients = [True, True, bias], [False, False, False]
    grad_loss, lse = torch.rand(9), torch.stack((torch.rand(9) + 3, torch.zeros(9)), dim=1)
    # The raw ops have no gradients: the autograd functions around them do.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    forward, backward = _ops.linear_cross_entropy_forward.default, _ops.linear_cross_entropy_backward.default
    torch.library.opcheck(forward, (None, no_gradients, *head), test_utils=checks)
    torch.library.opcheck(backward, (grad_loss, lse, needs, *head), test_utils=checks)
    if dtype == torch.float32:
        torch.library.opcheck(forward, (torch.ones(()), needs, *head), test_utils=checks)


def kib(key: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)


def growth(rank: int, world_size: int, dtype: torch.dtype) -> list[int]:
    """Return by how many KiB a step increases the peak memory of a new process: ours and torch's."""

    def eager(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight), target)

    def step(loss_of: Callable[..., torch.Tensor], tokens: int, entries: int) -> None:
        hidden = torch.ones(tokens, 64, dtype=dtype, requires_grad=True)
        weight = torch.ones(entries, 64, dtype=dtype, requires_grad=True)
        loss_of(hidden, weight, torch.zeros(tokens, dtype=torch.int64)).backward()

    sides = (fm.ops.linear_cross_entropy, eager)
    for side in sides:
        step(side, 64, 512)  # libraries
    before, peaks = kib("VmRSS:"), []
    for side in sides:  # the larger one last: the peak never falls
        step(side, 4096, 16384)
        peaks.append(kib("VmHWM:") - before)
    return peaks


@pytest.mark.cpu_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_peak_memory_is_a_fraction_of_eager(dtype: torch.dtype) -> None:
    """At 4096 tokens, 768 -> 50304, the peak is below 1/8 of eager; at this size fixed costs weigh more."""
    ((ours, eager),) = run_on_ranks(growth, 1, dtype)
    assert 0 < ours < eager / 6, (ours, eager)
