"""Start here when torch.func gives wrong numbers for an op, or an error that does not name it."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad

import fused_megatron as fm
from fused_megatron import collectives, context_parallel, expert_parallel, overlap, tensor_parallel
from fused_megatron.ops.autograd_function import AutogradFunction
from fused_megatron.testing import run_on_ranks

pytestmark = pytest.mark.cpu_kernel

IDS, TERMS = torch.tensor([1, 0, 3, 2]), fm.ops.LossTerms(8)
COS, SIN = torch.rand(4, 1), torch.rand(4, 1)
ORDER = fm.ops.order_by_expert(torch.tensor([[0, 1], [2, 0], [1, 2], [1, 0]]), 3)
NUMBERS = torch.zeros(2, dtype=torch.int64)
# Every public op as a function of x [4, 8].
OPS: dict[str, Callable[[torch.Tensor], Any]] = {
    "bias_dropout_add": lambda x: fm.ops.bias_dropout_add(x, None, torch.ones_like(x), 0.5, rng_state=NUMBERS),
    "bias_geglu": lambda x: fm.ops.bias_geglu(x, None),
    "bias_gelu": lambda x: fm.ops.bias_gelu(x, None),
    "bias_swiglu": lambda x: fm.ops.bias_swiglu(x, None),
    "combine_tokens": lambda x: fm.ops.combine_tokens(x.view(8, 4), ORDER),
    "cross_entropy": lambda x: fm.ops.cross_entropy(x, IDS),
    "cross_entropy_gradient": lambda x: fm.ops.cross_entropy_gradient(x[:, 0], x, IDS, x[:, :2], TERMS),
    "cross_entropy_gradient_": lambda x: fm.ops.cross_entropy_gradient_(x[:, 0], x.clone(), IDS, x[:, :2], TERMS),
    "cross_entropy_merge": lambda x: fm.ops.cross_entropy_merge(x[None, :, :3], IDS, TERMS, num_columns=8)[0],
    "cross_entropy_statistics": lambda x: fm.ops.cross_entropy_statistics(x, IDS, TERMS),
    "layer_norm": lambda x: fm.ops.layer_norm(x, torch.ones(8), torch.zeros(8)),
    "linear_cross_entropy": lambda x: fm.ops.linear_cross_entropy(x, torch.eye(8), IDS),
    "permute_tokens": lambda x: fm.ops.permute_tokens(x, ORDER),
    "permute_weights": lambda x: fm.ops.permute_weights(x[:, :2], ORDER),
    "query_key_norm": lambda x: fm.ops.query_key_norm(
        x[:, None], torch.ones(2), torch.ones(2), COS, SIN, eps=0.1, num_heads=2, num_kv_heads=1
    )[0],
    "rms_norm": lambda x: fm.ops.rms_norm(x, torch.ones(8)),
    "rotary_embedding": lambda x: fm.ops.rotary_embedding(x.view(4, 1, 4, 2), None, COS, SIN)[0],
    "route_tokens": lambda x: fm.ops.route_tokens(x, fm.ops.RoutingRule(3)).probabilities,
    "scaled_masked_softmax": lambda x: fm.ops.scaled_masked_softmax(x),
    "weighted_swiglu": lambda x: fm.ops.weighted_swiglu(x, x[:, 0]),
}


def without_recording(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return f under no_grad, which does not switch forward mode off."""
    return lambda *args: torch.no_grad()(f)(*args)


def with_tangent(f: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS: dict[str, Callable[[Callable[[torch.Tensor], Any], torch.Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jvp under no_grad": lambda f, x: torch.func.jvp(without_recording(f), (x,), (torch.ones_like(x),))[1],
    "forward mode": with_tangent,
    "forward mode under no_grad": lambda f, x: with_tangent(without_recording(f), x),
}


def test_every_op_is_here() -> None:
    without_gradient = {
        "LossTerms",
        "ExpertOrder",
        "Routes",
        "RoutingRule",
        "adamw_",
        "order_by_expert",
        "sum_of_squares",
    }
    assert {*OPS, *without_gradient, "attention"} == set(fm.ops.__all__)


@pytest.mark.parametrize("transform", [each for each in TRANSFORMS if each != "vmap"])
def test_a_transform_of_attention_over_documents_is_refused(transform: str) -> None:
    """float64 is no way out: it runs on the same kernels."""

    def over_documents(x: torch.Tensor) -> Any:
        x = x.view(4, 2, 4)
        return fm.ops.attention(x, x, x, documents=[0, 1, 4])

    with pytest.raises(
        RuntimeError, match=r"ops.attention does not support .* use backward\(\) or torch.autograd.grad$"
    ):
        TRANSFORMS[transform](over_documents, torch.rand(4, 8))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPS)
def test_a_transform_names_the_op_and_the_way_out(op: str, transform: str) -> None:
    """The way out works: float64 gives the same as the op's own gradients, and as the op row by row."""
    x = torch.rand(4, 8) + 0.5
    if (op, transform) == ("scaled_masked_softmax", "vmap"):  # no gradients are requested: torch runs it row by row
        assert torch.equal(TRANSFORMS[transform](OPS[op], x)[1], OPS[op](2 * x))
        return
    wanted = rf"fused_megatron.ops.{op} does not support torch.func .*; use backward\(\) or torch.autograd.grad \(or f"
    with pytest.raises(RuntimeError, match=wanted):
        TRANSFORMS[transform](OPS[op], x)
    if op.startswith("cross_entropy_"):  # their gradient is the gradient of cross_entropy
        return
    result = TRANSFORMS[transform](OPS[op], x.double())
    if transform == "vmap":
        expected = torch.stack([OPS[op](x.double()), OPS[op](2 * x.double())])
    elif transform == "grad":
        leaf = x.double().requires_grad_()
        (expected,) = torch.autograd.grad(OPS[op](leaf).sum(), leaf)
    else:
        step = torch.full_like(x, 1e-6, dtype=torch.float64)
        expected = (OPS[op](x.double() + step) - OPS[op](x.double() - step)) / 2e-6
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-8)


def test_a_tensor_without_a_tangent_goes_through() -> None:
    x = torch.rand(4, 8)
    with forward_ad.dual_level():
        assert all(torch.equal(f(x), f(x)) for f in (OPS["rms_norm"], OPS["scaled_masked_softmax"]))


def test_every_autograd_function_is_one_of_these() -> None:
    for package in (fm.ops, collectives, overlap, tensor_parallel, context_parallel, expert_parallel):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    rooms = ("ops", "collectives", "overlap", "tensor_parallel", "context_parallel", "expert_parallel")
    ours = [c for c in torch.autograd.Function.__subclasses__() if c.__module__.startswith("fused_megatron")]
    assert [c for c in ours if c.__module__.split(".")[1] in rooms] == [AutogradFunction]
    named = ("ops", "collectives", "tensor_parallel", "context_parallel", "expert_parallel", "models", "interop")
    assert all(c.op.partition(".")[0] in named for c in AutogradFunction.__subclasses__())


def parallel_case(rank: int, ranks: int) -> dict[str, str]:
    group = dist.group.WORLD
    weight, ids, x = torch.ones(4, 8), torch.tensor([0, 1]), torch.ones(2, 8)
    tp = tensor_parallel
    functions: dict[str, Callable[[torch.Tensor], Any]] = {
        "collectives.identity_all_reduce": lambda x: collectives.identity_all_reduce(x, group),
        "collectives.all_gather_reduce_scatter": lambda x: collectives.all_gather_reduce_scatter(x, 0, group),
        "collectives.identity_all_reduce_together": lambda x: collectives.identity_all_reduce_together((x,), group)[0],
        "tensor_parallel.column_parallel_linear": lambda x: tp.column_parallel_linear(x, weight, tp_group=group),
        "tensor_parallel.row_parallel_linear": lambda x: tp.row_parallel_linear(x, weight, tp_group=group),
        "tensor_parallel.vocab_parallel_embedding": lambda x: tp.vocab_parallel_embedding(
            ids, x, vocab_size=4, tp_group=group
        ),
        "tensor_parallel.vocab_parallel_cross_entropy": lambda x: tp.vocab_parallel_cross_entropy(
            x, ids, tp_group=group, vocab_size=16
        ),
        "tensor_parallel.vocab_parallel_linear_cross_entropy": lambda x: tp.vocab_parallel_linear_cross_entropy(
            x, weight, ids, tp_group=group, vocab_size=8
        ),
    }
    found = {}
    for name, function in functions.items():
        with pytest.raises(RuntimeError) as info:
            torch.func.grad(lambda x, f=function: f(x).sum())(x)
        found[name] = str(info.value)
    return found


def test_what_ranks_do_together_is_named_too() -> None:
    for found in run_on_ranks(parallel_case, 2):
        for name, message in found.items():
            assert message == (
                f"fused_megatron.{name} does not support torch.func (grad, vmap, jvp) and forward-mode gradients; "
                "use backward() or torch.autograd.grad"
            )
