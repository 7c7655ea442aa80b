"""Layer norm, forward and backward, against torch eager and torch.compile.

    pytest benchmarks/bench_layer_norm.py -s

The rounds of the three are interleaved, so that whatever else the machine does falls on all alike. The bytes are the
least that must move: x read and y written forward; dy and x read and dx written backward.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fused_megatron as fm

_ROUNDS = 20
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _step(op: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, ...]]:
    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gradients = torch.autograd.grad(op(x, weight, bias), (x, weight, bias), dy)
        if x.is_cuda:
            torch.cuda.synchronize()
        return gradients

    return run


def _torch_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _seconds(function: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(16, 256), (2048, 256), (2048, 1024), (8192, 4096)], ids=str)
def test_layer_norm(benchmark: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, bias = (
        torch.randn(size, device=_DEVICE).to(dtype).requires_grad_() for size in (shape, shape[1:], shape[1:])
    )
    dy = torch.randn(shape, device=_DEVICE).to(dtype)
    ours = _step(fm.ops.layer_norm)
    others = {
        "eager": _step(_torch_layer_norm),
        "compile": _step(torch.compile(_torch_layer_norm, fullgraph=True, dynamic=False)),
    }
    # No figure for wrong work; dx alone, since torch's bfloat16 gradients of weight and bias are wrong on the CPU.
    expected = others["eager"](*(t.detach().float().requires_grad_() for t in (x, weight, bias)), dy.float())
    torch.testing.assert_close(ours(x, weight, bias, dy)[0].float(), expected[0], rtol=2e-2, atol=2e-2)
    for other in others.values():
        other(x, weight, bias, dy)
    times: dict[str, list[float]] = {name: [] for name in others}

    def run_the_others() -> None:
        for name, other in others.items():
            times[name].append(_seconds(other, x, weight, bias, dy))

    benchmark.group = f"layer_norm {shape} {dtype}"
    benchmark.pedantic(ours, args=(x, weight, bias, dy), setup=run_the_others, rounds=_ROUNDS, warmup_rounds=1)
    median = benchmark.stats.stats.median
    num_bytes = 5 * x.numel() * x.element_size()
    benchmark.extra_info["gb_per_s"] = num_bytes / median / 1e9
    line = f"\nlayer_norm {shape} {dtype} {_DEVICE}: {median * 1e3:.3f} ms, {num_bytes / median / 1e9:.1f} GB/s"
    for name, seconds in times.items():
        other_median = statistics.median(seconds)
        benchmark.extra_info[f"speedup_over_{name}"] = other_median / median
        line += f"; {name} {other_median * 1e3:.3f} ms = {other_median / median:.2f}x"
    print(line)
