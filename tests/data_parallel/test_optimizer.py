"""Start here when an update differs from torch.optim.AdamW in float64, or a checkpoint loses some of its state."""

import pytest
import torch
from torch import nn

from fused_megatron.config import OptimizerConfig
from fused_megatron.data_parallel.optimizer import Optimizer
from fused_megatron.data_parallel.reduction import GradientBuckets

CONFIG = OptimizerConfig(lr=1e-2, weight_decay=0.3)


def built(dtype: torch.dtype) -> tuple[dict[str, nn.Parameter], GradientBuckets, Optimizer]:
    torch.manual_seed(0)
    parameters = {"weight": nn.Parameter(torch.randn(5, 3).to(dtype)), "bias": nn.Parameter(torch.randn(5).to(dtype))}
    gradients = GradientBuckets(list(parameters.values()), None)
    return parameters, gradients, Optimizer(parameters, gradients.by_name(parameters), CONFIG)


def gradient(step: int, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_equal_adamw_on_wide_weights(dtype: torch.dtype) -> None:
    parameters, gradients, optimizer = built(dtype)
    wide = [p.detach().double().requires_grad_() for p in parameters.values()]
    theirs = torch.optim.AdamW(
        [{"params": wide[:1], "weight_decay": 0.3}, {"params": wide[1:], "weight_decay": 0.0}],
        betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps,
    )  # fmt: skip
    for step in range(20):
        for group in theirs.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        for ours, p in zip(parameters.values(), wide, strict=True):
            gradients[ours].copy_(gradient(step, p.shape))
            p.grad = 0.5 * gradient(step, p.shape).double()
        optimizer.step(1e-2 / (step + 1), gradient_scale=0.5)
        theirs.step()
    for (name, ours), p in zip(parameters.items(), wide, strict=True):
        torch.testing.assert_close(optimizer.main[name].double(), p.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(ours.detach(), optimizer.main[name].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_carries_on_in_a_fresh_optimizer(dtype: torch.dtype) -> None:
    first, second = built(dtype), built(dtype)
    kinds = {"exp_avg", "exp_avg_sq"} | ({"main"} if dtype == torch.bfloat16 else set())
    for step in range(6):
        parameters, gradients, optimizer = first if step < 3 else second
        if step == 3:
            optimizer.set_step(3)
            for name, tensors in first[2].state().items():
                assert tensors.keys() == kinds
                parameters[name].data.copy_(first[0][name])
                for kind, tensor in optimizer.state()[name].items():
                    tensor.copy_(tensors[kind])
        for p in parameters.values():
            gradients[p].copy_(gradient(step, p.shape))
        optimizer.step(1e-2)
    whole = built(dtype)
    for step in range(6):
        for p in whole[0].values():
            whole[1][p].copy_(gradient(step, p.shape))
        whole[2].step(1e-2)
    for name, p in whole[0].items():
        assert torch.equal(p, second[0][name])
