"""Start here when torch's fused products over symmetric memory give other values, or are used in the wrong cases."""

import itertools
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symm_mem

from fused_megatron.overlap import OverlapCosts, symmetric_memory
from fused_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear, parallel_mlp
from fused_megatron.testing import run_on_ranks

S, H, FFN = 768, 8, 12


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "symm_mem", "_c10d_functional"):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def step(choice, fused, dtype, sequence_parallel=True):
    torch.manual_seed(1)
    options = {"tp_group": dist.group.WORLD, "sequence_parallel": sequence_parallel, "overlap": choice}
    up, down = ColumnParallelLinear(H, FFN, dtype=dtype, **options), RowParallelLinear(FFN, H, dtype=dtype, **options)
    torch.nn.init.normal_(down.bias)
    torch.manual_seed(2 + dist.get_rank())
    x, dy = torch.randn(S, 1, H, dtype=dtype, requires_grad=True), torch.randn(S, 1, H, dtype=dtype)
    with Calls() as calls:
        if fused:
            y = parallel_mlp(x, up.weight, up.bias, down.weight, down.bias, **options)
        else:
            y = down(torch.tanh(up(x)))
        y.backward(dy)
    return [y, x.grad, *(p.grad for p in (*up.parameters(), *down.parameters()))], calls.names, repr(up)


def layers(rank, ranks):
    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", symm_mem._fused_all_gather_matmul_fallback, "CPU")
    library.impl("fused_matmul_reduce_scatter", symm_mem._fused_matmul_reduce_scatter_fallback, "CPU")
    costs = OverlapCosts(1e9, 0.0, 1e8, symmetric_memory=True)  # every product wants chunks
    sys.modules["fused_megatron.overlap.chunk_choice"].overlap_costs = lambda *arguments: costs
    # Each way that is timed takes less time than the one before; the fused op, and the MLP layer by layer, come last.
    fake_times = itertools.count(0, -1)
    sys.modules["fused_megatron.overlap.timed_ways"].seconds_of = lambda *arguments, **others: next(fake_times)
    ColumnParallelLinear._measure_overlap = lambda self, *a: setattr(self, "by_symmetric_memory", True)
    for fused in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            mine, calls, text = step(True, fused, dtype)
            wanted, plain_calls, _ = step(False, fused, dtype)
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            for a, b in zip(mine, wanted, strict=True):
                assert ((a - b).norm() / b.norm()).item() < tolerance
            ops = [name for name in calls if name.startswith("fused")]
            assert ops == ["fused_all_gather_matmul", "fused_matmul_reduce_scatter"] * 2, ops
            # The only other collective: the weight gradient of the column layer gathers its input again.
            assert [name for name in calls if name.endswith("base_")] == ["_allgather_base_"], calls
            assert not any(name.startswith("fused") for name in plain_calls)
            assert "overlap=auto, by symmetric memory" in text
    _, calls, _ = step(3, False, torch.float32)
    assert not any(name.startswith("fused") for name in calls), "a number of chunks is what the user asked for"
    _, calls, text = step(True, False, torch.float32, sequence_parallel=False)
    assert not any(name.startswith("fused") for name in calls) and text.endswith("overlap=auto)")


def test_layers_by_symmetric_memory():
    run_on_ranks(layers, 2)


def test_the_ops_that_are_called_have_these_signatures():
    schemas = [getattr(torch.ops.symm_mem, n).default._schema for n in
               ("fused_all_gather_matmul", "fused_matmul_reduce_scatter")]  # fmt: skip
    assert [[a.name for a in s.arguments] for s in schemas] == [
        ["A", "Bs", "gather_dim", "group_name", "return_A"],
        ["A", "B", "reduce_op", "scatter_dim", "group_name"],
    ]


ALL, NONE = [[False, True], [True, False]], [[False, False], [False, False]]


@pytest.mark.parametrize(
    ("places", "wanted"),
    [
        ([["a", 0, ALL], ["a", 1, ALL]], True),
        ([["a", 0, ALL], ["b", 1, ALL]], False),  # two hosts
        ([["a", 0, ALL], ["a", 0, ALL]], False),  # each sees only its own GPU
        ([["a", 0, NONE], ["a", 1, NONE]], False),  # PCIe
        ([["a", 0, ALL], ["a", 1, []]], False),  # one rank cannot tell
        ([["a", 0, ALL], ["a", 2, ALL]], False),
    ],
)
def test_one_domain(places, wanted):
    assert symmetric_memory._one_domain(places) == wanted


def test_links_and_operands_here():
    assert symmetric_memory._nvlinks() == []
    x = torch.ones(4, 1, 2)
    assert symmetric_memory.applies(x, 0)
    for refused, dim in ((x, None), (x, 1), (x.double(), 0), (x[0, 0], 0)):
        assert not symmetric_memory.applies(refused, dim)
