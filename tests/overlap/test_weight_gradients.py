"""Start here when deferred weight gradients are lost, or have other bits."""

import contextlib
import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.sharding import DeferredWeightGradients, parameter_record, update_record
from fused_megatron.tensor_parallel import (
    ColumnParallelLinear,
    OutputPart,
    RowParallelLinear,
    StackedColumnParallelLinear,
    parallel_mlp,
)
from fused_megatron.testing.run_on_ranks import run_on_ranks

S, H, FFN = 8, 4, 12


class MLP(nn.Module):
    """MLP as one function with chunks, for more than one rank."""

    def __init__(self, group, sequence_parallel):
        super().__init__()
        options = {"tp_group": group, "sequence_parallel": sequence_parallel}
        self.up, self.down = ColumnParallelLinear(H, FFN, **options), RowParallelLinear(FFN, H, **options)
        self.options = options

    def forward(self, x):
        up, down = self.up, self.down
        return parallel_mlp(x, up.weight, up.bias, down.weight, down.bias, overlap=2, **self.options)


def make_layer(name, group, sequence_parallel):
    options = {"tp_group": group, "sequence_parallel": sequence_parallel}
    if name == "column":
        return ColumnParallelLinear(H, FFN, **options)
    if name == "row":
        return RowParallelLinear(FFN, H, **options)
    if name == "mlp":
        return MLP(group, sequence_parallel)
    copies = 2 if name == "copied" and group is not None else 1
    return StackedColumnParallelLinear(H, (OutputPart("a", 6), OutputPart("b", 2, copies)), **options)


def backwards(name, group, main_grad, defer, frozen=False, autocast=False, sequence_parallel=False):
    """Run two microbatches; return all gradients, the number of deferred products, and the weights with a gradient
    before these products ran."""
    torch.manual_seed(5)
    layer = make_layer(name, group, sequence_parallel)
    torch.manual_seed(group.rank() if group is not None else 0)
    store, products, waiting = DeferredWeightGradients(), [[], []], []
    for parameter in layer.parameters():
        parameter.data.normal_()
        parameter.requires_grad_(not (frozen and parameter.ndim == 2))
        if main_grad:
            update_record(parameter, main_grad=functools.partial(torch.Tensor.detach, torch.zeros_like(parameter)))
        if defer:
            update_record(parameter, deferred=store)
    gradients = []
    for microbatch in range(2):
        x = torch.randn(S // (2 if sequence_parallel and name != "row" else 1), 1, FFN if name == "row" else H)
        x = x[..., : FFN // 2 if name == "row" and group is not None else None].requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
            y = layer(x)
        with store.collecting(products[microbatch]):
            y.backward(torch.randn_like(y))
        gradients.append(x.grad)
    weights = [p for p in layer.parameters() if p.ndim == 2]
    totals = [total_of(p) for p in weights]
    waiting = [p.grad is None and (t is None or not t.any()) for p, t in zip(weights, totals, strict=True)]
    for product in products[0] + products[1]:
        product()
    for parameter in layer.parameters():
        gradients += [parameter.grad, total_of(parameter)]
        assert parameter.grad is None or not parameter.grad.requires_grad
    return gradients, len(products[0]) + len(products[1]), waiting


def total_of(parameter):
    main_grad = parameter_record(parameter).main_grad
    return None if main_grad is None else main_grad()


def same(first, second):
    return all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_layer(name, group, main_grad, sequence_parallel=False):
    now, none, _ = backwards(name, group, main_grad, False, sequence_parallel=sequence_parallel)
    later, count, waiting = backwards(name, group, main_grad, True, sequence_parallel=sequence_parallel)
    assert none == 0 and same(now, later), (name, main_grad, sequence_parallel)
    return count, waiting


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("name", ["column", "row", "mlp", "stacked"])
def test_same_bits_on_one_rank(name, main_grad):
    weights = 2 if name == "mlp" else 1
    assert check_layer(name, None, main_grad) == (2 * weights, [True] * weights)


def test_frozen_and_cast_weights_leave_nothing():
    for name in ("column", "row"):
        gradients, count, _ = backwards(name, None, False, True, frozen=True)
        assert count == 0 and gradients[2] is None and gradients[4] is not None
        cast, count, waiting = backwards(name, None, False, True, autocast=True)
        assert count == 0 and waiting == [False]
        assert same(cast, backwards(name, None, False, False, autocast=True)[0])


def on_two_ranks(rank, world_size):
    group = dist.group.WORLD
    found = {}
    for sequence_parallel in (False, True):
        for name in ("column", "row", "mlp", "stacked", "copied"):
            found[name, sequence_parallel] = check_layer(name, group, sequence_parallel, sequence_parallel)
    return found


def test_same_bits_on_two_ranks():
    for found in run_on_ranks(on_two_ranks, 2):
        for (name, _), (count, waiting) in found.items():
            weights = 2 if name == "mlp" else 1
            # The gradient of rows on several ranks is summed over them in the backward itself.
            assert (count, waiting) == ((0, [False]) if name == "copied" else (2 * weights, [True] * weights)), name
