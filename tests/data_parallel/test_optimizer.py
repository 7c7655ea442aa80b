"""Start here when an update differs from torch's optimizer in float64, or a checkpoint loses some of its state."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from fused_megatron.config import OptimizerConfig
from fused_megatron.data_parallel import optimizer as optimizer_module
from fused_megatron.data_parallel.optimizer import Optimizer
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.sharding import Replicas

CONFIG = OptimizerConfig(lr=1e-2, weight_decay=0.3)
Built = tuple[dict[str, nn.Parameter], GradientBuckets, Optimizer]


class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv 2302.06675, algorithm 2."""

    def __init__(self, groups: Any, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 1e-2})
        self.betas = betas

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        beta1, beta2 = self.betas
        for group in self.param_groups:
            for p in group["params"]:
                assert p.grad is not None
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = (beta1 * m + (1 - beta1) * p.grad).sign()
                p -= group["lr"] * (update + group["weight_decay"] * p)
                m.copy_(beta2 * m + (1 - beta2) * p.grad)


def sgd(momentum: float, nesterov: bool) -> Callable[..., torch.optim.Optimizer]:
    return lambda groups: torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov)


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps)


def lion(groups: Any) -> torch.optim.Optimizer:
    return Lion(groups, (CONFIG.beta1, CONFIG.beta2))


CASES: list[tuple[dict[str, Any], Callable[..., torch.optim.Optimizer], set[str]]] = [
    ({}, adamw, {"exp_avg", "exp_avg_sq"}),
    ({"kind": "sgd"}, sgd(0.9, False), {"momentum_buffer"}),
    ({"kind": "sgd", "momentum": 0.8, "nesterov": True}, sgd(0.8, True), {"momentum_buffer"}),
    ({"kind": "sgd", "momentum": 0.0}, sgd(0.0, False), set()),
    ({"kind": "lion"}, lion, {"exp_avg"}),
]


def built(dtype: torch.dtype, **settings: Any) -> Built:
    torch.manual_seed(0)
    shapes = {"first": (5, 3), "second": (2, 4), "bias": (5,)}
    parameters = {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}
    gradients = GradientBuckets(list(parameters.values()), Replicas())
    config = OptimizerConfig(lr=1e-2, weight_decay=0.3, **settings)
    return parameters, gradients, Optimizer(parameters, gradients.by_name(parameters), config)


def gradient(step: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def take_steps(run: Built, steps: Sequence[int], gradient_scale: Any = 1.0) -> None:
    parameters, gradients, optimizer = run
    for step in steps:
        for p in parameters.values():
            gradients[p].copy_(gradient(step, p.shape))
        optimizer.step(1e-2 / (step + 1), gradient_scale)


@pytest.mark.parametrize(("settings", "make", "kinds"), CASES, ids=[str(case[0]) for case in CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_torch_on_wide_weights(
    dtype: torch.dtype, settings: dict[str, Any], make: Callable[..., torch.optim.Optimizer], kinds: set[str]
) -> None:
    run = parameters, gradients, optimizer = built(dtype, **settings)
    wide = [p.detach().double().requires_grad_() for p in parameters.values()]
    theirs = make([{"params": wide[:2], "weight_decay": 0.3}, {"params": wide[2:], "weight_decay": 0.0}])
    for step in range(20):
        for group in theirs.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        for p in wide:
            p.grad = 0.5 * gradient(step, p.shape).double()
        take_steps(run, [step], gradient_scale=0.5 if step % 2 else torch.tensor(0.5))
        theirs.step()
    for (name, ours), p in zip(parameters.items(), wide, strict=True):
        torch.testing.assert_close(optimizer.main[name].double(), p.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(ours.detach(), optimizer.main[name].to(dtype))
        assert torch.equal(gradients[ours], gradient(19, p.shape)), "the update changes no gradient"


@pytest.mark.parametrize(("settings", "make", "kinds"), CASES, ids=[str(case[0]) for case in CASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_carries_on_in_a_fresh_optimizer(
    dtype: torch.dtype, settings: dict[str, Any], make: Any, kinds: set[str]
) -> None:
    first, second, whole = (built(dtype, **settings) for _ in range(3))
    take_steps(first, range(3))
    second[2].set_step(3)
    for name, tensors in first[2].state().items():
        assert tensors.keys() == kinds | ({"main"} if dtype == torch.bfloat16 else set())
        second[0][name].data.copy_(first[0][name])
        for kind, tensor in second[2].state()[name].items():
            tensor.copy_(tensors[kind])
    take_steps(second, range(3, 6))
    take_steps(whole, range(6))
    assert all(torch.equal(p, second[0][name]) for name, p in whole[0].items())


@pytest.mark.parametrize("settings", [case[0] for case in CASES], ids=str)
def test_the_batches_of_an_update_change_no_bit(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    whole, cut = (built(torch.bfloat16, **settings) for _ in range(2))
    take_steps(whole, range(3))
    monkeypatch.setattr(optimizer_module, "BATCH_ELEMENTS", 1)
    take_steps(cut, range(3))
    assert all(torch.equal(p, cut[0][name]) for name, p in whole[0].items())
