"""Start here when parallel_mlp differs from its two layers."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fused_megatron.checks import InputError
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.tensor_parallel import column_parallel_linear, parallel_mlp, row_parallel_linear
from fused_megatron.testing import assert_close, run_cases_on_ranks, run_on_ranks

S, B, H, FFN = 16, 3, 12, 40


def truth(activation, dtype, compute_dtype):
    generator = torch.Generator().manual_seed(3)
    gates = 1 if activation == "gelu" else 2
    shapes = [(S, B, H), (gates, FFN, H), (gates, FFN), (H, FFN), (H,), (S, B, H)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    leaves = [t.to(compute_dtype).requires_grad_() for t in tensors[:5]]
    x, up, up_bias, down, down_bias = leaves
    h = F.linear(x, up.flatten(0, 1), up_bias.flatten())
    if activation == "gelu":
        a = F.gelu(h, approximate="tanh")
    else:
        gate, value = h.chunk(2, -1)
        a = (F.silu(gate) if activation == "swiglu" else F.gelu(gate, approximate="tanh")) * value
    y = F.linear(a, down, down_bias)
    return tensors, [y.detach(), *torch.autograd.grad(y, leaves, tensors[5].to(compute_dtype))]


def shards(rank, ranks, sequence_parallel):
    own_sequence = (lambda t: t.chunk(ranks)[rank]) if sequence_parallel else (lambda t: t)
    own_up = lambda t: t.chunk(ranks, 1)[rank].flatten(0, 1)  # noqa: E731
    return [own_sequence, own_up, own_up, lambda t: t.chunk(ranks, 1)[rank], lambda t: t]


def mlp_case(rank, ranks, dtype, activation, sequence_parallel, overlap):
    tensors, expected = truth(activation, dtype, torch.float64)
    _, by_torch = truth(activation, dtype, dtype)
    cut = shards(rank, ranks, sequence_parallel)
    leaves = [f(t).detach().clone().requires_grad_() for f, t in zip(cut, tensors, strict=False)]
    dy = cut[0](tensors[5])
    y = parallel_mlp(
        *leaves, activation=activation, tp_group=dist.group.WORLD, sequence_parallel=sequence_parallel,
        overlap=overlap,
    )  # fmt: skip
    y.backward(dy)
    names = ["y", "dx", "dup", "dup_bias", "ddown", "ddown_bias"]
    actual = [y.detach(), *(t.grad for t in leaves)]
    for name, mine, f, want, torch_result in zip(names, actual, [cut[0], *cut], expected, by_torch, strict=True):
        assert_close(f"{name} of {activation} on rank {rank}", mine, f(want), f(torch_result), ranks=ranks)
    return actual


@pytest.mark.parametrize("ranks", [2, 4])
def test_output_and_every_gradient(ranks):
    dtypes, activations = (torch.float32, torch.bfloat16), ("gelu", "swiglu", "geglu")
    cases = list(itertools.product(dtypes, activations, (False, True), (False, True, 3)))
    for case, results in zip(cases, run_cases_on_ranks(mlp_case, ranks, cases), strict=True):
        _, _, sequence_parallel, _ = case
        for other in results[1:]:  # replicated tensors are bitwise the same
            assert torch.equal(other[5], results[0][5]), case
            assert sequence_parallel or all(torch.equal(other[i], results[0][i]) for i in (0, 1)), case


def order_of_work(rank, ranks, sequence_parallel):
    tensors = truth("gelu", torch.float32, torch.float32)[0]
    cut = shards(rank, ranks, sequence_parallel)
    leaves = [f(t).detach().clone().requires_grad_() for f, t in zip(cut, tensors, strict=False)]
    with record_communication() as forward:
        y = parallel_mlp(*leaves, tp_group=dist.group.WORLD, sequence_parallel=sequence_parallel, overlap=2)
    with record_communication() as backward:
        y.sum().backward()
    return forward.order, backward.order


def test_every_product_has_a_collective_beside_it():
    whole, blocks = run_cases_on_ranks(order_of_work, 2, [(False,), (True,)])
    for forward, backward in whole:
        assert forward == ["mm", "mm", "all_reduce"] * 2
        assert backward == ["mm", "mm", "all_reduce"] * 2 + ["mm", "mm"]
    for forward, backward in blocks:
        chunk = ["mm", "mm", "reduce_scatter"]
        assert forward == ["all_gather"] * 2 + chunk * 2
        assert backward == ["all_gather"] * 4 + chunk * 2 + ["mm"] * 2  # of dy and x


def bits(rank, ranks):
    for sequence_parallel in (False, True):
        results = []
        for overlap in (False, 1, 2):
            cut = shards(rank, ranks, sequence_parallel)
            tensors = truth("gelu", torch.float32, torch.float32)[0]
            leaves = [f(t).detach().clone().requires_grad_() for f, t in zip(cut, tensors, strict=False)]
            options = {"tp_group": dist.group.WORLD, "sequence_parallel": sequence_parallel, "overlap": overlap}
            y = parallel_mlp(*leaves, **options)
            y.backward(cut[0](tensors[5]))
            results.append([y.detach(), *(t.grad for t in leaves)])
        for other in results[1:]:
            same = (0, 1) if sequence_parallel else (0, 1, 2, 4, 5)
            assert all(torch.equal(results[0][i], other[i]) for i in same)


def test_chunks_change_no_bit_but_where_rows_are_summed_in_another_order():
    run_on_ranks(bits, 2)


def only_what_is_needed(rank, ranks):
    tensors = truth("gelu", torch.float32, torch.float32)[0]
    whole = None
    for needed in [(0, 1, 2, 3, 4), (0,), (1, 2), (3,), (0, 2, 4)]:
        leaves = [f(t).detach().clone() for f, t in zip(shards(rank, ranks, True), tensors, strict=False)]
        for i in needed:
            leaves[i].requires_grad_()
        parallel_mlp(*leaves, tp_group=dist.group.WORLD, sequence_parallel=True, overlap=2).backward(
            tensors[5].chunk(ranks)[rank]
        )
        whole = whole or [t.grad for t in leaves]
        for i, leaf in enumerate(leaves):
            assert torch.equal(leaf.grad, whole[i]) if i in needed else leaf.grad is None


def test_only_needed_gradients():
    run_on_ranks(only_what_is_needed, 2)


def test_no_group_and_no_biases():
    tensors, _ = truth("swiglu", torch.float64, torch.float64)
    x, up, _, down, _, _ = tensors
    y = parallel_mlp(x, up.flatten(0, 1), None, down, None, activation="swiglu", tp_group=None)
    h = column_parallel_linear(x, up.flatten(0, 1), tp_group=None)
    gate, value = h.chunk(2, -1)
    assert torch.allclose(y, row_parallel_linear(F.silu(gate) * value, down, tp_group=None))


def test_errors():
    x, up, down = torch.zeros(4, H), torch.zeros(FFN, H), torch.zeros(H, FFN)
    with pytest.raises(InputError, match="activation='relu' must be one of 'gelu', 'gelu_exact', 'geglu', 'swiglu'"):
        parallel_mlp(x, up, None, down, None, activation="relu", tp_group=None)
    with pytest.raises(InputError, match="number of input features 40"):
        parallel_mlp(x, up, None, down, None, activation="swiglu", tp_group=None)
    with pytest.raises(TypeError, match="dtype"):
        parallel_mlp(x, up, None, down.bfloat16(), None, tp_group=None)


def test_old_argument_names_warn():
    x, up, down = torch.randn(4, H), torch.randn(FFN, H), torch.randn(H, FFN)
    with pytest.warns(DeprecationWarning) as found:
        y = parallel_mlp(x, up_weight=up, up_bias=None, down_weight=down, down_bias=None, tp_group=None)
    assert torch.equal(y, parallel_mlp(x, up, None, down, None, tp_group=None))
    new = ("expansion_weight", "expansion_bias", "projection_weight", "projection_bias")
    assert all(any(f"{name}=" in str(warning.message) for warning in found) for name in new)
