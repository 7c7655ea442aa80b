"""Start here when gradients of experts are lost, deferred or rounded otherwise than those of other layers."""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.expert_parallel import ExpertMLP
from fused_megatron.expert_parallel.dispatch import LocalTokens
from fused_megatron.expert_parallel.expert_part import ExpertShapes
from fused_megatron.expert_parallel.expert_products import ExpertFunction
from fused_megatron.expert_parallel.token_order import TableOrder
from fused_megatron.expert_parallel.weighted_activation import ACTIVATIONS
from fused_megatron.ops.expert_permutation import order_by_expert
from fused_megatron.sharding.parameter_record import DeferredWeightGradients, update_record
from fused_megatron.testing import assert_close
from fused_megatron.testing.drawn_routes import draw_routes

E, H, WIDTH, T, K = 8, 16, 24, 37, 2


def drawn(activation="swiglu", bias=False, dtype=torch.float32, routing="one_expert"):
    torch.manual_seed(0)
    layer = ExpertMLP(E, H, WIDTH, activation=activation, bias=bias, init_std=0.3, dtype=dtype)
    for parameter in (layer.expansion_bias, layer.projection_bias) if bias else ():
        torch.nn.init.normal_(parameter)
    return layer, torch.randn(T, H).to(dtype), draw_routes(routing, T, E, K), torch.randn(T, H).to(dtype)


def run(layer, x, routes, gradient):
    layer.zero_grad()
    x, probabilities = x.clone().requires_grad_(), routes.probabilities.clone().requires_grad_()
    y = layer(x, routes.experts, probabilities)
    y.backward(gradient)
    return [y.detach(), x.grad, probabilities.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("bias", [False, True])
def test_weights_with_a_main_gradient_add_to_it(bias):
    layer, *given = drawn(bias=bias)
    plain = run(layer, *given)
    totals = {name: torch.ones_like(p) for name, p in layer.named_parameters() if "weight" in name}
    for name, total in totals.items():
        update_record(layer.get_parameter(name), main_grad=lambda total=total: total)
    found = run(layer, *given)
    assert found[3] is found[4] is None
    for before, total in zip(plain[3:5], totals.values(), strict=True):
        assert torch.allclose(total - 1, before, atol=1e-6)
    for a, b in zip(found[:3] + found[5:], plain[:3] + plain[5:], strict=True):
        assert a.equal(b)


def test_bfloat16_weights_add_to_a_float32_main_gradient_without_rounding():
    layer, *given = drawn(dtype=torch.bfloat16)
    x, probabilities = given[0].float(), given[1].probabilities
    total = torch.zeros(layer.projection_weight.shape)
    update_record(layer.projection_weight, main_grad=lambda: total)
    run(layer, *given)
    wide = ExpertMLP(E, H, WIDTH)
    wide.load_state_dict({name: value.float() for name, value in layer.state_dict().items()})
    wide(x, given[1].experts, probabilities).backward(given[2].float())
    assert total.ne(total.bfloat16().float()).any()
    assert torch.allclose(total, wide.projection_weight.grad, atol=0.02 * total.abs().max())


@pytest.mark.parametrize("with_main_grad", [False, True])
def test_deferred_weight_gradients(with_main_grad):
    layer, *given = drawn("gelu", bias=True)
    plain, products, store = run(layer, *given), [], DeferredWeightGradients()
    of_weights = {weight: torch.zeros_like(weight) for weight in (layer.expansion_weight, layer.projection_weight)}
    for weight, total in of_weights.items():
        update_record(weight, deferred=store, main_grad=(lambda total=total: total) if with_main_grad else None)
    with store.collecting(products):
        found = run(layer, *given)
    assert found[3] is found[4] is None and len(products) == 2
    for product in products:
        product()
    weights = [total if with_main_grad else weight.grad for weight, total in of_weights.items()]
    for a, b in zip(found[:3] + weights + found[5:], plain, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_experts_in_one_grouped_product(activation):
    """Take the way of a GPU, with the numbers of rows in a tensor, on this CPU."""
    layer, x, routes, gradient = drawn(activation, bias=True, routing="empty_rank")
    wanted = run(layer, x, routes, gradient)
    layer.zero_grad()
    x, probabilities = x.clone().requires_grad_(), routes.probabilities.clone().requires_grad_()
    order = order_by_expert(routes.experts, E)
    exchange = LocalTokens(TableOrder(0, E, order.counts, T * K, order))
    weights = layer.expansion_weight, layer.expansion_bias, layer.projection_weight, layer.projection_bias
    y = ExpertFunction.apply(x, probabilities, *weights, ExpertShapes(E, ACTIVATIONS[activation]), exchange)
    y.backward(gradient)
    found = [y.detach(), x.grad, probabilities.grad, *(p.grad for p in layer.parameters())]
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def loop_of_experts(layer, x, routes, gradient, dtype):
    """Compute swiglu experts one after the other with torch's own ops."""
    expansion, projection = (w.detach().to(dtype).requires_grad_() for w in layer.parameters())
    x, probabilities = x.to(dtype).requires_grad_(), routes.probabilities.to(dtype).requires_grad_()
    y = torch.zeros_like(x)
    for expert in range(E):
        token, k = (routes.experts == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], expansion.unflatten(0, (E, -1))[expert]).chunk(2, dim=1)
        out = F.linear(F.silu(gate) * up, projection.unflatten(0, (E, -1))[expert])
        y = y.index_add(0, token, out * probabilities[token, k, None])
    y.backward(gradient.to(dtype))
    return [y.detach(), x.grad, probabilities.grad, expansion.grad, projection.grad]


def test_bfloat16_is_as_exact_as_torch():
    layer, *given = drawn(dtype=torch.bfloat16, routing="random")
    found = run(layer, *given)
    exact, plain = loop_of_experts(layer, *given, torch.float64), loop_of_experts(layer, *given, torch.bfloat16)
    for name, *values in zip(
        ("y", "dx", "dprobabilities", "expansion", "projection"), found, exact, plain, strict=True
    ):
        actual, wanted, of_torch = values
        assert_close(name, actual.to(torch.bfloat16), wanted, of_torch)


def test_frozen_experts_and_inputs_without_gradients():
    layer, x, routes, gradient = drawn()
    layer.requires_grad_(False)
    wanted = run(layer, x, routes, gradient)
    assert wanted[3] is wanted[4] is None and wanted[1] is not None
    layer.requires_grad_(True)
    layer(x, *routes).backward(gradient)
    assert layer.expansion_weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert layer(x, *routes).equal(wanted[0])
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, *routes)
    assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), wanted[0], atol=0.05 * wanted[0].abs().max())
