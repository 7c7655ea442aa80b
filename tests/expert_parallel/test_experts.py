"""Start here when experts over ranks differ from experts on one rank: results, gradients, bytes, repeatability."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.expert_parallel import ExpertMLP
from fused_megatron.mesh import init_mesh
from fused_megatron.sharding import parameter_parts
from fused_megatron.testing import run_cases_on_ranks
from fused_megatron.testing.drawn_routes import ROUTINGS, draw_routes, ragged_tokens

E, H, WIDTH = 8, 12, 20
NAMES = ("expansion_weight", "projection_weight", "expansion_bias", "projection_bias")


class Case(NamedTuple):
    """A layer of experts and its input: ep and etp ranks, K, and the other arguments of ExpertMLP."""

    ep: int
    etp: int
    routing: str
    dispatch: str | None
    num_selected: int = 2
    activation: str = "swiglu"
    bias: bool = False
    dtype: torch.dtype = torch.float32
    overlap: int = 1
    drops: bool = False
    ragged: bool = True


@cache
def groups(ep, etp):
    mesh = init_mesh(expert_parallel_size=ep, expert_tensor_parallel_size=etp)
    return mesh["ep"].group, mesh["etp"].group


def layer_of(case, ep_group=None, etp_group=None):
    layer = ExpertMLP(
        E,
        H,
        WIDTH,
        activation=case.activation,
        bias=case.bias,
        ep_group=ep_group,
        etp_group=etp_group,
        dispatch=case.dispatch,
        overlap=case.overlap,
        init_std=0.4,
        dtype=case.dtype,
    )
    layer.reset_parameters(3, "experts")
    for name in NAMES[2:] if case.bias else ():
        for part in parameter_parts(layer.get_parameter(name)):
            generator = torch.Generator().manual_seed(sum(map(ord, part.name + name)))
            full = torch.randn(part.shard.full_shape, generator=generator)
            rows = part.of(layer.get_parameter(name).data)
            rows.copy_(full[part.shard.offset[0] : part.shard.offset[0] + len(rows)])
    return layer


class Inputs(NamedTuple):
    x: torch.Tensor
    experts: torch.Tensor
    probabilities: torch.Tensor
    keep: torch.Tensor | None
    grad: torch.Tensor


def inputs(case, rank):
    ranks = case.ep * case.etp
    tokens = ragged_tokens(24, ranks)[rank] if case.ragged else 24
    routes = draw_routes(
        case.routing, tokens, E, case.num_selected, rank=rank // case.etp, num_ranks=case.ep, seed=rank
    )
    generator = torch.Generator().manual_seed(rank)
    x, grad = (torch.randn(tokens, H, generator=generator).to(case.dtype) for _ in range(2))
    keep = torch.rand(routes.experts.shape, generator=generator) < 0.7 if case.drops else None
    return Inputs(x, *routes, keep, grad)


def dense(case, weights, x, experts, probabilities, keep):
    """Compute all experts for all tokens in float64, and take what the routes choose."""
    results = []
    for expert in range(E):
        expansion = [weights[name] for name in weights if name.startswith(f"expansion_weight.{expert}")]
        biases = [weights[name] for name in weights if name.startswith(f"expansion_bias.{expert}")]
        h = [x @ w.T + (biases[i] if biases else 0) for i, w in enumerate(expansion)]
        if case.activation == "swiglu":
            a = F.silu(h[0]) * h[1]
        elif case.activation == "geglu":
            a = F.gelu(h[0], approximate="tanh") * h[1]
        else:
            a = F.gelu(h[0], approximate="none" if case.activation == "gelu_exact" else "tanh")
        bias = weights.get(f"projection_bias.{expert}", 0)
        results.append(a @ weights[f"projection_weight.{expert}"].T + bias)
    chosen = torch.stack(results, 1).gather(1, experts[..., None].expand(-1, -1, H))
    return (chosen * (probabilities if keep is None else probabilities * keep)[..., None]).sum(1)


def expected(case):
    """Return for each rank y and the gradients of x and probabilities; and the gradients of all full weights."""
    whole, weights = layer_of(case), {}
    for name in NAMES:
        parameter = getattr(whole, name)
        for part in parameter_parts(parameter) if parameter is not None else ():
            weights[part.full_name(name)] = part.of(parameter.detach()).double().requires_grad_()
    every = [inputs(case, rank) for rank in range(case.ep * case.etp)]
    x, experts, probabilities, keep, grad = (
        None if tensors[0] is None else torch.cat(tensors) for tensors in zip(*every, strict=True)
    )
    leaves = x.double().requires_grad_(), probabilities.double().requires_grad_()
    y = dense(case, weights, leaves[0], experts, leaves[1], keep)
    y.backward(grad.double())
    tokens = [len(given.x) for given in every]
    of_ranks = zip(*(t.split(tokens) for t in (y.detach(), *(leaf.grad for leaf in leaves))), strict=True)
    return list(of_ranks), {name: w.grad for name, w in weights.items()}


def run_layer(layer, given):
    x, probabilities = given.x.clone().requires_grad_(), given.probabilities.clone().requires_grad_()
    y = layer(x, given.experts, probabilities, keep=given.keep)
    y.backward(given.grad)
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return [y.detach(), x.grad, probabilities.grad], gradients


def relative_error(actual, wanted):
    """Return the largest error, relative to the largest value but at least to 1, which is about the largest input."""
    assert actual.shape == wanted.shape
    return (actual.double() - wanted).abs().max().item() / max(1, wanted.abs().max().item()) if wanted.numel() else 0.0


def errors(rank, world_size, case):
    """Return the largest error of each result of this rank, relative to the largest value of the reference."""
    ranks = case.ep * case.etp
    ep_group, etp_group = groups(case.ep, case.etp)
    layer = layer_of(case, ep_group, etp_group)
    of_ranks, of_weights = expected(case)
    found, gradients = run_layer(layer, inputs(case, rank % ranks))
    again, again_gradients = run_layer(layer_of(case, ep_group, etp_group), inputs(case, rank % ranks))
    pairs = dict(zip(("y", "dx", "dprobabilities"), zip(found, of_ranks[rank % ranks], strict=True), strict=True))
    for name, gradient in gradients.items():
        for part in parameter_parts(layer.get_parameter(name)):
            held = part.held(gradient)
            pairs[part.full_name(name)] = held.tensor, of_weights[part.full_name(name)][held.box.slices()]
    repeated = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    repeated = repeated and all(torch.equal(gradients[name], again_gradients[name]) for name in gradients)
    worst = {name: relative_error(*pair) for name, pair in pairs.items()}
    return repeated, max(worst, key=worst.get), max(worst.values())


LAYOUTS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2)], 8: [(4, 2)]}
KINDS = [
    dict(activation="gelu", bias=True),
    dict(activation="swiglu"),
    dict(activation="geglu", bias=True, num_selected=3),
    dict(activation="swiglu", bias=True, drops=True),
    dict(activation="gelu_exact", num_selected=1),
    dict(activation="swiglu", num_selected=5, ragged=False, overlap=2),
    dict(activation="gelu", num_selected=4, drops=True, overlap=3),
]


def cases(world_size, both_dispatches):
    """Every routing in each layout, over both dispatches or over one of them in turn; the other options take turns."""
    index = 0
    for ep, etp in LAYOUTS[world_size]:
        for number, routing in enumerate(ROUTINGS):
            ways = ("all_to_all", "all_gather") if world_size > 1 else (None,)
            for dispatch in ways if both_dispatches or world_size == 1 else ways[number % 2 :][:1]:
                yield Case(ep, etp, routing, dispatch, **KINDS[index % len(KINDS)])
                index += 1
        if world_size > 1:
            yield Case(ep, etp, "random", "all_to_all", dtype=torch.bfloat16, overlap=2)
            yield Case(ep, etp, "random", "all_gather", dtype=torch.bfloat16, bias=True)


@pytest.mark.parametrize(
    ("world_size", "both_dispatches"),
    [*((ranks, False) for ranks in LAYOUTS), *(pytest.param(r, True, marks=pytest.mark.slow) for r in (2, 4))],
)
def test_results_and_gradients_are_those_of_dense_experts(world_size, both_dispatches):
    every = list(cases(world_size, both_dispatches))
    for case, of_ranks in zip(every, run_cases_on_ranks(errors, world_size, [(case,) for case in every]), strict=True):
        for repeated, name, error in of_ranks:
            assert repeated, case
            assert error < (2e-6 if case.dtype == torch.float32 else 0.03), (case, name, error)
