"""Cross-entropy, forward and backward, against torch eager and torch.compile.

    pytest benchmarks/bench_cross_entropy.py -s

The rounds of the three are interleaved, so that whatever else the machine does falls on all alike. The bytes are the
least that must move: each logit read forward, read backward, and its gradient written.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fused_megatron as fm

_ROUNDS = 15
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _forward_backward(loss_of: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(loss_of(logits, target), logits)
        if logits.is_cuda:
            torch.cuda.synchronize()
        return gradient

    return run


def _seconds(function: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1024, 50304), (8192, 8192)], ids=str)
def test_cross_entropy(benchmark: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = torch.randn(shape, device=_DEVICE).to(dtype).requires_grad_()
    target = torch.randint(0, shape[1], shape[:1], device=_DEVICE)
    ours = _forward_backward(fm.ops.cross_entropy)
    others = {
        "eager": _forward_backward(F.cross_entropy),
        "compile": _forward_backward(torch.compile(F.cross_entropy, fullgraph=True, dynamic=False)),
    }
    expected = others["eager"](logits.detach().float().requires_grad_(), target)
    torch.testing.assert_close(ours(logits, target).float(), expected, rtol=2e-2, atol=1e-5)  # no figure for wrong work
    for other in others.values():
        other(logits, target)
    times: dict[str, list[float]] = {name: [] for name in others}

    def run_the_others() -> None:
        for name, other in others.items():
            times[name].append(_seconds(other, logits, target))

    benchmark.group = f"cross_entropy {shape} {dtype}"
    benchmark.pedantic(ours, args=(logits, target), setup=run_the_others, rounds=_ROUNDS, warmup_rounds=1)
    median = benchmark.stats.stats.median
    num_bytes = 3 * logits.numel() * logits.element_size()
    benchmark.extra_info["gb_per_s"] = num_bytes / median / 1e9
    line = f"\ncross_entropy {shape} {dtype} {_DEVICE}: {median * 1e3:.1f} ms, {num_bytes / median / 1e9:.1f} GB/s"
    for name, seconds in times.items():
        other_median = statistics.median(seconds)
        benchmark.extra_info[f"speedup_over_{name}"] = other_median / median
        line += f"; {name} {other_median * 1e3:.1f} ms = {other_median / median:.2f}x"
    print(line)
