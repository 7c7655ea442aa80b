"""Start here when benchmarks/megatron_kernels.py counts a compiled function of megatron-core wrongly."""

import importlib
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def test_a_compiled_function_is_one_kernel(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("megatron_kernels")

    @module.compiled
    def bias_gelu(bias, x):
        return inner(x + bias) * 2

    @module.compiled(dynamic=True)
    def inner(x):
        return x.tanh()

    x, bias = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((5, 3), (3,)))
    with module.Counts() as counts:
        y = bias_gelu(bias, x)
        inner(y).add_(1)
    assert counts.launches == {"MLP activation": 1, "other": 2}
    assert counts.moved == {"MLP activation": 2 * (15 + 3 + 15), "other": 2 * (15 + 15) + 2 * (15 + 15)}
    assert not counts.paused
