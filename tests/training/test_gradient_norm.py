"""The global norm counts every parameter once, accurately."""

import pytest
import torch

from fused_megatron.config import GPTConfig
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.mesh import init_mesh
from fused_megatron.models import GPT
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.training.gradient_norm import clip_coefficient, global_gradient_norm, non_finite_parameters

CONFIG = GPTConfig(num_layers=1, hidden_size=16, num_heads=4, seq_len=8, vocab_size=50, pad_vocab_size_to_multiple_of=8)


def norm_of_ones(rank: int, world_size: int, tp: int) -> float:
    mesh = init_mesh(tp)
    parameters = dict(GPT(CONFIG, layout=mesh.layout()).named_parameters())
    gradients = GradientBuckets(list(parameters.values()), mesh.dp_group)
    for p in parameters.values():
        gradients[p].fill_(1.0)
    if rank % tp == tp - 1:  # ranks hold 16 rows of 50 or 28 of 50: the last ones are padding, which has no gradient
        weight = parameters["token_embedding.weight"]
        gradients[weight][50 - (tp - 1) * weight.shape[0] :] = 0
    return float(global_gradient_norm(parameters, gradients, mesh.tp_group))


@pytest.mark.parametrize(("world_size", "tp"), [(1, 1), (2, 2), (4, 2), (4, 4)])
def test_every_parameter_counts_once(world_size: int, tp: int) -> None:
    expected = GPT(CONFIG).num_parameters() ** 0.5
    for norm in run_on_ranks(norm_of_ones, world_size, tp):
        assert norm == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 2_000_003])
def test_long_vectors_are_summed_accurately(size: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(size))
    gradients = GradientBuckets([parameter], None)
    gradients[parameter].copy_(torch.randn(size, generator=torch.Generator().manual_seed(1)) * 1e-3)
    norm = global_gradient_norm({"p": parameter}, gradients, None)
    assert float(norm) == pytest.approx(float(gradients[parameter].double().norm()), rel=1e-7)


def test_clip_coefficient_is_that_of_torch() -> None:
    for norm in (0.5, 1.0, 7.0):
        p = torch.nn.Parameter(torch.zeros(1))
        p.grad = torch.tensor([norm])
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        assert norm * clip_coefficient(norm, 1.0) == pytest.approx(float(p.grad), rel=1e-6)
    assert clip_coefficient(1e9, 0.0) == 1.0


def test_names_of_parameters_that_are_not_finite() -> None:
    parameters = {name: torch.nn.Parameter(torch.zeros(3)) for name in "abc"}
    gradients = GradientBuckets(list(parameters.values()), None)
    gradients[parameters["b"]][1] = float("nan")
    gradients[parameters["c"]][2] = float("-inf")
    assert non_finite_parameters(parameters, gradients) == ["b", "c"]
