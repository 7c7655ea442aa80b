"""Start here when gradients are too large or too small by the number of data-parallel ranks or microbatches."""

import torch
import torch.nn.functional as F
from torch import nn

from fused_megatron.data_parallel.gradient_division import gradient_divisor
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.mesh import init_mesh
from fused_megatron.pipeline import PipelineExecutor, StageFunctions, build_schedule
from fused_megatron.sharding import Replicas
from fused_megatron.testing.run_on_ranks import run_on_ranks

SAMPLES, TARGETS, CLASSES = 8, 3, 5


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, CLASSES)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (SAMPLES, TARGETS)
    return torch.randn(*shape, 4, generator=generator), torch.randint(CLASSES, shape, generator=generator)


def loss_sum(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")


def reduced(rank: int, world_size: int) -> torch.Tensor:
    mesh, stage = init_mesh(), model()
    gradients = GradientBuckets(list(stage.parameters()), Replicas.of_copies(mesh.dp_group))
    hooks = StageFunctions(reduce=gradients.reduce)
    executor = PipelineExecutor(build_schedule("1f1b", 1, 2), {0: stage}, pp_group=None, loss_fn=loss_sum, hooks=hooks)
    x, target = (part.chunk(world_size)[rank] for part in batch())
    executor.step(x.chunk(2), target.chunk(2), loss_divisor=gradient_divisor(SAMPLES * TARGETS))
    return gradients.by_name(dict(stage.named_parameters()))["weight"].clone()


def test_gradients_are_the_mean_over_the_targets_of_all_ranks() -> None:
    whole = model()
    x, target = batch()
    F.cross_entropy(whole(x).flatten(0, 1), target.flatten()).backward()
    for gradient in (*run_on_ranks(reduced, 1), *run_on_ranks(reduced, 2)):
        torch.testing.assert_close(gradient, whole.weight.grad, rtol=1e-5, atol=1e-7)
