"""Start here when the contract accepts an op that breaks it."""

import functools

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._subclasses import FakeTensor

from fused_megatron.ops import bias_gelu
from fused_megatron.testing.op_contract import CLAUSES, CPU_CLAUSES, Contract


def unfused(x, bias):
    return F.gelu(x + bias, approximate="tanh")


def draw(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, bias, dy = (torch.randn(size, generator=generator).to(dtype) for size in (shape, shape[-1:], shape))
    return (x, bias), dy


def writes_an_input(x, bias):
    y = bias_gelu(x, bias)
    x.data.view(-1)[:1] += 1
    return y


def breaks_the_graph(x, bias):
    torch._dynamo.graph_break()
    return bias_gelu(x, bias)


def scaled(factor):
    """bias_gelu times a function of its inputs: 1 for a correct op, something else for a fault."""

    def op(x, bias):
        return bias_gelu(x, bias) * factor(x, bias)

    return op


FAULTY = {
    "strides": scaled(lambda x, bias: 1 if x.is_contiguous() else 2),
    "memory": writes_an_input,
    "twice": scaled(lambda x, bias: 1 + 1e-2 * torch.rand(())),
    "empty": lambda x, bias: bias_gelu(x, bias) if x.numel() else x.new_zeros(1) + bias.sum(),
    "no_grad": scaled(lambda x, bias: 1 if torch.is_grad_enabled() else 2),
    "single_gradients": scaled(lambda x, bias: 1 if bias.requires_grad else 2),
    "gradients_of_gradients": unfused,  # a kernel must refuse a second derivative, not compute a wrong one
    "opcheck": unfused,  # contains no op of this package
    "compile": breaks_the_graph,
    "fake_tensors": lambda x, bias: bias_gelu(x, bias).float() if isinstance(x, FakeTensor) else bias_gelu(x, bias),
    "threads": scaled(lambda x, bias: torch.get_num_threads()),
    "streaming": scaled(lambda x, bias: 1 + x.shape[0]),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_broken_clause_is_found(name):
    contract = functools.partial(Contract, unfused=unfused, draw=draw, wide=(8, 8), streamed=(12, 8))
    clause = next(clause for clause in (*CLAUSES, *CPU_CLAUSES) if clause.startswith(f"{name} "))
    # torch raises for a wrong shape of an empty result.
    with pytest.raises((AssertionError, RuntimeError, torch._dynamo.exc.Unsupported)):
        contract(FAULTY[name]).check(clause)
    if name not in ("opcheck", "compile"):  # correct ops take seconds, and tests/ops tests some
        contract(bias_gelu).check(clause)


def test_every_clause_has_its_fault():
    assert {clause.partition(" ")[0] for clause in (*CLAUSES, *CPU_CLAUSES)} == set(FAULTY)
