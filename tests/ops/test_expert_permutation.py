"""Start here when tokens reach a wrong expert, come back to a wrong token, or get a wrong gradient on the way."""

import functools

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.ops import ExpertOrder, combine_tokens, order_by_expert, permute_tokens, permute_weights
from fused_megatron.reference.expert_permutation import expert_order
from fused_megatron.testing.op_contract import CLAUSES, CPU_CLAUSES, Contract
from fused_megatron.testing.op_gradients import assert_op_matches, output_and_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_EXPERTS, NUM_SELECTED = 5, 3


def draw_experts(num_tokens, num_experts=NUM_EXPERTS, num_selected=NUM_SELECTED):
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(3))
    return scores.topk(num_selected, 1).indices


def order_for(x, experts):
    """Return the order by the op; for float64, which no kernel computes, quickly by the reference."""
    plain = x.dtype == torch.float64
    return ExpertOrder(*expert_order(experts, NUM_EXPERTS)) if plain else order_by_expert(experts, NUM_EXPERTS)


def permuted(x, experts):
    return permute_tokens(x, order_for(x, experts))


def unfused_permuted(x, experts):
    return x[(experts.flatten().argsort(stable=True) // experts.shape[1])]


def combined(y, experts, weights):
    return combine_tokens(y, order_for(y, experts), weights)


def unfused_combined(y, experts, weights):
    rows = y[experts.flatten().argsort(stable=True).argsort()].unflatten(0, experts.shape)
    return (rows if weights is None else rows * weights.unsqueeze(2).to(rows.dtype)).sum(1)


def draw(form, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    tokens, width = shape
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    y = torch.randn(tokens * NUM_SELECTED, width, generator=generator).to(dtype)
    weights = torch.rand(tokens, NUM_SELECTED, generator=generator)
    if dtype == torch.float64:
        weights = weights.double()
    experts = draw_experts(tokens)
    if form == "permute":
        return (x, experts), y
    return (y, experts, None if form == "sum" else weights), x


FORMS = {
    "permute": (permuted, unfused_permuted),
    "combine": (combined, unfused_combined),
    "sum": (combined, unfused_combined),
}


def contract(form):
    shapes = {"shape": (12, 52), "odd": (3, 6), "empty": ((0, 8), (4, 0)), "wide": (300, 150)}
    return Contract(*FORMS[form], functools.partial(draw, form), **shapes)


@pytest.mark.parametrize("clause", CLAUSES)
@pytest.mark.parametrize("form", FORMS)
def test_contract(form, clause, device):
    contract(form).check(clause, device)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("clause", [clause for clause in CPU_CLAUSES if not clause.startswith("streaming")])
@pytest.mark.parametrize("form", ["combine"])
def test_contract_on_the_cpu(form, clause):
    contract(form).check(clause)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (5, 97), (40, 128), (3, 300), (33, 260)])
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients(form, shape, dtype, device):
    inputs, dy = draw(form, shape, dtype)
    assert_op_matches(*FORMS[form], [None if t is None else t.to(device) for t in inputs], dy.to(device))


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("width", [512, 500])
def test_rows_written_past_the_caches(width):
    """Results of more than 4 MiB, whose rows begin at cache lines or not."""
    (y, experts, weights), dy = draw("combine", (1000, width), torch.float32)
    order = order_by_expert(experts, NUM_EXPERTS)
    assert torch.equal(permute_tokens(dy, order), dy[order.rows // NUM_SELECTED])
    _, grad_y, _ = output_and_gradients(combined, (y, experts, weights), dy)
    assert torch.equal(grad_y, (weights.flatten().unsqueeze(1) * dy.repeat_interleave(NUM_SELECTED, 0))[order.rows])


# Tokens, experts, selected: nothing; one of each; experts without tokens; several parts of pairs.
@pytest.mark.parametrize("shape", [(0, 4, 2), (1, 1, 1), (9, 300, 2), (40, 7, 3), (1800, 6, 5), (400, 130, 8)])
def test_order(shape, device):
    tokens, num_experts, num_selected = shape
    experts = draw_experts(tokens, num_experts, num_selected).to(device)
    order = order_by_expert(experts, num_experts)
    rows = experts.flatten().argsort(stable=True)
    assert torch.equal(order.rows, rows)
    assert torch.equal(order.places, rows.argsort().view_as(experts))
    assert torch.equal(order.counts, torch.bincount(experts.flatten().cpu(), minlength=num_experts).to(device))


@pytest.mark.cpu_kernel
def test_order_of_many_pairs():
    """More pairs than one part of the sort."""
    experts = draw_experts(7000, 130, 3)
    order = order_by_expert(experts, 130)
    assert torch.equal(order.rows, experts.flatten().argsort(stable=True))
    assert torch.equal(order.places.flatten()[order.rows], torch.arange(21000))


def test_all_tokens_to_one_expert(device):
    order = order_by_expert(torch.full((70, 1), 2, device=device), 4)
    assert torch.equal(order.rows, torch.arange(70, device=device)) and order.counts.tolist() == [0, 0, 70, 0]


def test_dropped_pairs_come_last_and_add_nothing(device):
    """A cut order leaves them out: no row, no part of a sum, gradient 0."""
    experts = draw_experts(20)
    experts[torch.rand(experts.shape, generator=torch.Generator().manual_seed(5)) < 0.3] = -1
    kept = (experts >= 0).flatten()
    num_kept = int(kept.sum())
    order = order_by_expert(experts.to(device), NUM_EXPERTS)
    assert int(order.counts.sum()) == num_kept < kept.numel()
    assert torch.equal(order.rows.cpu(), experts.flatten().where(kept, torch.tensor(9)).argsort(stable=True))
    cut = ExpertOrder(order.rows[:num_kept], order.places, order.counts)
    (x, _), (y, _, weights) = draw("permute", (20, 24), torch.float32)[0], draw("combine", (20, 24), torch.float32)[0]
    dy = torch.randn(20, 24, generator=torch.Generator().manual_seed(6)).to(device)
    rows = cut.rows.cpu()

    def plain(y, weights):
        pairs = torch.zeros(60, 24, dtype=y.dtype).index_copy(0, rows, y)
        return (pairs.unflatten(0, (20, 3)) * weights.masked_fill(~kept.view(20, 3), 0).unsqueeze(2)).sum(1)

    y = y[:num_kept]
    actual = output_and_gradients(lambda y, w: combine_tokens(y, cut, w), (y.to(device), weights.to(device)), dy)
    for a, e in zip(actual, output_and_gradients(plain, (y, weights), dy.cpu()), strict=True):
        torch.testing.assert_close(a.cpu(), e, rtol=1e-5, atol=1e-5)
    assert not actual[2].flatten()[~kept.to(device)].any()
    permuted, grad_x = output_and_gradients(lambda x: permute_tokens(x, cut), (x.to(device),), y.to(device))
    assert torch.equal(permuted.cpu(), x[rows // 3])
    torch.testing.assert_close(grad_x.cpu(), torch.zeros(20, 24).index_add(0, rows // 3, y), rtol=1e-5, atol=1e-5)
    of_pairs, grad = output_and_gradients(lambda w: permute_weights(w, cut), (weights.to(device),), y[:, 0].to(device))
    assert torch.equal(of_pairs.cpu(), weights.flatten()[rows])
    assert torch.equal(grad.cpu().flatten(), torch.zeros(60).index_copy(0, rows, y[:, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_pairs(dtype, device):
    experts = draw_experts(11).to(device)
    weights = torch.rand(11, NUM_SELECTED, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    dy = torch.rand(33, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    order = order_by_expert(experts, NUM_EXPERTS)
    found, grad = output_and_gradients(lambda w: permute_weights(w, order), (weights,), dy)
    assert torch.equal(found, weights.flatten()[order.rows]) and torch.equal(grad, dy[order.places])


def test_permutation_and_sum_are_inverse(device):
    """With one expert a token each row comes back bit for bit."""
    x = torch.randn(50, 36, generator=torch.Generator().manual_seed(1)).to(device)
    order = order_by_expert(draw_experts(50, num_selected=1).to(device), NUM_EXPERTS)
    assert torch.equal(combine_tokens(permute_tokens(x, order), order), x)


def test_bad_arguments(device):
    experts = draw_experts(4).to(device)
    order = order_by_expert(experts, NUM_EXPERTS)
    x, y = torch.zeros(4, 8, device=device), torch.zeros(12, 8, device=device)
    with pytest.raises(TypeError, match=r"experts.dtype=int32 must be one of: int64"):
        order_by_expert(experts.int(), NUM_EXPERTS)
    with pytest.raises(InputError, match=r"experts.shape=\(4,\) must be"):
        order_by_expert(experts[:, 0], NUM_EXPERTS)
    with pytest.raises(InputError, match=r"x.shape=\(3, 8\) must have the tokens of the order, 4"):
        permute_tokens(x[:3], order)
    with pytest.raises(InputError, match=r"y.shape=\(4, 8\) must be \(12, 8\)"):
        combine_tokens(x, order)
    with pytest.raises(InputError, match=r"weights.shape=\(4, 2\) must be \(4, 3\)"):
        combine_tokens(y, order, torch.zeros(4, 2, device=device))
    with pytest.raises(TypeError, match=r"weights.dtype=bfloat16"):
        combine_tokens(y, order, torch.zeros(4, 3, device=device).bfloat16())
    with pytest.raises(InputError, match=r"weights.shape=\(4, 2\)"):
        permute_weights(torch.zeros(4, 2, device=device), order)
    with pytest.raises(InputError, match="device"):
        permute_tokens(x.to("meta"), order)
    with pytest.raises(InputError, match=r"x.shape=\(4, 8, 1\) must be \[rows, hidden size\]"):
        permute_tokens(x.unsqueeze(2), order)


def test_an_id_above_the_last_expert(device):
    """The CPU refuses it. A GPU, which reads no ids on the host, drops the pair."""
    experts = torch.tensor([[0, 9], [3, 1]], device=device)
    if device == "cpu":
        with pytest.raises(InputError, match="the id 9 must be below num_experts=5"):
            order_by_expert(experts, NUM_EXPERTS)
    rows, places, counts = torch.ops.fused_megatron.expert_order(experts, NUM_EXPERTS)
    assert rows.tolist() == [0, 3, 2, 1] and places.tolist() == [[0, 3], [2, 1]] and counts.tolist() == [1, 1, 0, 1, 0]
