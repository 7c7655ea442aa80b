"""Start here when the gradient of a norm, a bias or a router differs between tensor-parallel layouts."""

import pytest
import torch
from torch import nn

import fused_megatron as fm
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.sharding import Replicas, used_by_parts
from fused_megatron.tensor_parallel import RowParallelLinear, SequenceParallelLayerNorm, SequenceParallelRMSNorm
from fused_megatron.testing.run_on_ranks import run_cases_on_ranks, run_on_ranks

HIDDEN, ROWS, BATCHES = 10, 4, 3


class Norms(nn.Module):
    """Two norms and the bias of a row-parallel layer, on this rank's block of the sequence."""

    def __init__(self, group: torch.distributed.ProcessGroup | None, frozen: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"tp_group": group, "sequence_parallel": True}
        self.first = SequenceParallelLayerNorm(HIDDEN, **options)
        self.down = RowParallelLinear(4, HIDDEN, skip_bias_add=True, init_std=0.3, **options)
        self.second = SequenceParallelRMSNorm(HIDDEN, **options)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() == 1:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) + 1)
        self.first.bias.requires_grad_(not frozen)  # the weight of the same norm is trained

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)) + self.down.skipped_bias())


def batch(index: int, dp_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and dy, [2 ROWS, HIDDEN]: the sequence of both tensor-parallel ranks."""
    generator = torch.Generator().manual_seed(7 * index + dp_rank)
    x, dy = torch.randn(2, 2 * ROWS, HIDDEN, generator=generator)
    return x, dy


def wanted(frozen: bool, batches: int, dp_ranks: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Compute the sums of the gradients in float64, without the layers of this package."""
    model = Norms(None, frozen)
    weights = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    for index in range(batches):
        for dp_rank in dp_ranks:
            x, dy = (each.double() for each in batch(index, dp_rank))
            y = torch.layer_norm(x, (HIDDEN,), weights["first.weight"], weights["first.bias"], model.first.eps)
            y = torch.tanh(y) + weights["down.bias"]
            torch.rms_norm(y, (HIDDEN,), weights["second.weight"], model.second.eps).backward(dy)
    return {name: w.grad for name, w in weights.items() if w.grad is not None}


def own_rows(x: torch.Tensor, rank: int) -> torch.Tensor:
    return x.chunk(2)[rank]


def in_buckets(rank: int, world_size: int, frozen: bool) -> tuple[dict[str, torch.Tensor], int, int]:
    """Return the gradients of two steps' second step, and the all-reduces during its backwards and at its end."""
    mesh = fm.init_mesh(tensor_parallel_size=2)
    model = Norms(mesh.tp_group, frozen)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buckets = GradientBuckets(list(trained.values()), Replicas.of_copies(mesh.dp_group))
    for _ in range(2):
        buckets.zero_()
        with record_communication() as backward:
            for index in range(BATCHES):
                x, dy = (own_rows(each, mesh.tp_rank) for each in batch(index, mesh.dp_rank))
                model(x).backward(dy)
        with record_communication() as end:
            buckets.finish()
    return {n: buckets[p].clone() for n, p in trained.items()}, backward.counts["all_reduce"], end.counts["all_reduce"]


@pytest.mark.parametrize("frozen", [False, True])
def test_buckets_sum_parts_once_in_a_step(frozen: bool) -> None:
    ranks = run_on_ranks(in_buckets, 4, frozen)
    expected = wanted(frozen, BATCHES, (0, 1))
    for gradients, during, at_end in ranks:
        # One of the data-parallel ranks, one of the parts. A norm of which only the weight is trained sums in backward.
        assert (during, at_end) == (BATCHES if frozen else 0, 2)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name].double(), gradient, rtol=1e-5, atol=1e-5, msg=name)
            assert torch.equal(gradients[name], ranks[0][0][name])


def shared_state(rank: int, world_size: int, stage: int) -> dict[str, torch.Tensor]:
    """Return the updates of SGD after backwards of which the first two end a sum each."""
    mesh = fm.init_mesh(tensor_parallel_size=2)
    model = Norms(mesh.tp_group, frozen=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fm.shard_data_parallel(model, mesh, stage)
    optimizer = fm.ShardedOptimizer(model, torch.optim.SGD, lr=1.0)
    for index in range(BATCHES):
        x, dy = (own_rows(each, mesh.tp_rank) for each in batch(index, mesh.dp_rank))
        model(x).backward(dy)
    optimizer.step()
    after = fm.full_state_dict(model)
    return {name: before[name] - after[name] for name in before if name != "down.weight"}


def test_a_sum_that_is_complete_is_not_summed_again() -> None:
    expected = wanted(False, BATCHES, (0, 1))
    for stage, by_rank in zip((1, 2, 3), run_cases_on_ranks(shared_state, 4, [(1,), (2,), (3,)]), strict=True):
        for updates in by_rank:
            for name, gradient in expected.items():
                torch.testing.assert_close(
                    updates[name].double(), gradient / 2, rtol=1e-4, atol=1e-5, msg=f"{name}, stage {stage}"
                )


def without_buckets(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    group = torch.distributed.group.WORLD
    model = Norms(group, frozen=False)
    x, dy = (own_rows(each, rank) for each in batch(0, 0))
    model(x).backward(dy)
    assert used_by_parts((model.first.weight,), None)[0] is model.first.weight
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_complete_after_backward_without_buckets() -> None:
    for gradients in run_on_ranks(without_buckets, 2):
        for name, gradient in wanted(False, 1, (0,)).items():
            torch.testing.assert_close(gradients[name].double(), gradient, rtol=1e-5, atol=1e-5, msg=name)
