"""Start here when a stage computes with a shard of its weights, or a hook is called at the wrong time."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.pipeline import PipelineExecutor, StageFunctions, StageHooks, build_schedule, lower
from fused_megatron.pipeline.run.stage_hooks import Wait
from fused_megatron.pipeline.schedule.action import stages_of
from fused_megatron.sharding import Replicas
from fused_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from fused_megatron.testing.run_on_ranks import run_on_ranks

# An odd width, so that the shards of the ranks differ in size.
WIDTH, STEPS, MICROBATCHES = 7, 2, 3


class Block(nn.Module):
    """Residual MLP of our linear layers, which defer weight gradients, or of torch's, recomputed in backward."""

    def __init__(self, ours: bool) -> None:
        super().__init__()
        self.ours = ours
        self.norm = nn.LayerNorm(WIDTH)
        up, down = (ColumnParallelLinear, RowParallelLinear) if ours else (nn.Linear, nn.Linear)
        options = {"tp_group": None} if ours else {}
        self.up, self.down = up(WIDTH, 10, **options), down(10, WIDTH, **options)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) if self.ours else checkpoint(self.block, x, use_reentrant=False)


class GatheredStages:
    """StageHooks of stages whose full weights exist only between UNSHARD and RESHARD; each rank keeps some rows.

    Released weights have no memory, so that a computation at the wrong time fails.
    """

    def __init__(self, stages: dict[int, nn.Module], gradients: GradientBuckets, group: dist.ProcessGroup) -> None:
        self.stages, self.gradients, self.group = stages, gradients, group
        self.calls: list[str] = []
        rank = dist.get_rank(group)
        self.shards = {
            (stage, name): p.detach().tensor_split(dist.get_world_size(group))[rank].clone()
            for stage, module in stages.items()
            for name, p in module.named_parameters()
        }
        for stage in stages:
            self.reshard(stage)

    def reduce(self, stage: int) -> Wait | None:
        self.calls.append(f"{stage}REDUCE_GRAD")
        return self.gradients.reduce(stage)

    def unshard(self, stage: int) -> Wait:
        self.calls.append(f"{stage}UNSHARD")
        started = []
        for name, p in self.stages[stage].named_parameters():
            rows = [part.contiguous() for part in torch.empty(p.shape).tensor_split(dist.get_world_size(self.group))]
            for source, part in enumerate(rows):
                if source == dist.get_rank(self.group):
                    part.copy_(self.shards[stage, name])
            works = [dist.broadcast(part, group_src=i, group=self.group, async_op=True) for i, part in enumerate(rows)]
            started.append((p, rows, works))

        def wait() -> None:
            for p, rows, works in started:
                for work in works:
                    work.wait()
                p.untyped_storage().resize_(p.numel() * p.element_size())
                with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(p):
                    p.copy_(torch.cat(rows))

        return wait

    def reshard(self, stage: int) -> None:
        self.calls.append(f"{stage}RESHARD")
        for p in self.stages[stage].parameters():
            p.untyped_storage().resize_(0)

    def update(self, stage: int, index: int) -> None:
        raise AssertionError("the schedule is synchronous")


def loss_fn(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (y - target).square().sum()


def make_stages(indices: tuple[int, ...], ours: bool) -> dict[int, nn.Module]:
    stages = {}
    for index in indices:
        torch.manual_seed(index)
        stages[index] = Block(ours)
        for parameter in stages[index].parameters():
            nn.init.normal_(parameter, std=0.4)
    return stages


def microbatches(step: int, dp_rank: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(10 * step + dp_rank)
    drawn = [torch.randn(2, 2 + index, WIDTH, generator=generator) for index in range(MICROBATCHES)]
    return [pair[0] for pair in drawn], [pair[1] for pair in drawn]


def trained(mesh, name: str, per_rank: int, ours: bool, max_unsharded: int | None) -> tuple[dict, list, list[str]]:
    """Return the weights of this rank's stages after two steps of momentum, the losses, and the calls of the hooks."""
    schedule = build_schedule(name, mesh.pp_size, MICROBATCHES, per_rank)
    stages = make_stages(stages_of(schedule.placement, mesh.pp_rank), ours)
    gradients = GradientBuckets(
        {i: list(stage.parameters()) for i, stage in stages.items()}, Replicas.of_copies(mesh.dp_group), 100
    )
    hooks: StageHooks = StageFunctions(reduce=gradients.reduce)
    weights = {(i, n): p for i, stage in stages.items() for n, p in stage.named_parameters()}
    gathered = None
    if max_unsharded is not None:
        hooks = gathered = GatheredStages(stages, gradients, mesh.dp_group)
        weights = gathered.shards
    executor = PipelineExecutor(
        lower(schedule, max_unsharded), stages, pp_group=mesh.pp_group, loss_fn=loss_fn, hooks=hooks
    )
    velocity = {key: torch.zeros_like(value) for key, value in weights.items()}
    losses = []
    for step in range(STEPS):
        gradients.zero_()
        inputs, targets = microbatches(step, mesh.dp_rank)
        losses.append(executor.step(inputs, targets, loss_divisor=50.0).item())
        losses.append(executor.evaluate(inputs, targets, loss_divisor=50.0).item())
        for (stage, name), weight in weights.items():
            gradient = gradients[stages[stage].get_parameter(name)]
            if gathered is not None:
                gradient = gradient.tensor_split(mesh.dp_size)[mesh.dp_rank]
            velocity[stage, name].mul_(0.9).add_(gradient)
            with torch.no_grad():
                weight.sub_(velocity[stage, name], alpha=0.1)
    executor.close()
    calls = gathered.calls if gathered is not None else []
    if gathered is not None:
        assert all(p.untyped_storage().size() == 0 for stage in stages.values() for p in stage.parameters())
        for stage in stages:
            gathered.unshard(stage)()
    return {(i, n): p.detach().clone() for i, s in stages.items() for n, p in s.named_parameters()}, losses, calls


def compare(rank: int, world_size: int, cases: list) -> list[str]:
    """Compare all cases with and without sharded weights; return the calls of the last case."""
    mesh = fm.init_mesh(pipeline_parallel_size=world_size // 2)
    for name, per_rank, ours, limit in cases:
        weights, losses, _ = trained(mesh, name, per_rank, ours, None)
        sharded, sharded_losses, calls = trained(mesh, name, per_rank, ours, limit)
        assert losses == sharded_losses, (name, limit)
        for key, weight in weights.items():
            assert torch.equal(weight, sharded[key]), (name, limit, key)
    return calls


CASES = [
    ("interleaved_1f1b", 3, False, 1),
    ("interleaved_zero_bubble", 2, True, 1),
    ("looped_breadth_first", 3, True, 2),
    ("looped_breadth_first", 3, False, 1),
]


def test_weights_that_are_gathered_and_dropped_train_as_whole_ones() -> None:
    calls = run_on_ranks(compare, 2, CASES)[0]
    # The weights are released first; then come a step, and an evaluation without the gathers of backwards.
    step = "0UNSHARD 0RESHARD 1UNSHARD 1RESHARD 2UNSHARD 2REDUCE_GRAD 2RESHARD 1UNSHARD 1REDUCE_GRAD 1RESHARD 0UNSHARD"
    evaluation = "0UNSHARD 0RESHARD 1UNSHARD 1RESHARD 2UNSHARD 2RESHARD"
    assert calls[3:22] == f"{step} 0REDUCE_GRAD 0RESHARD {evaluation}".split()


def test_gathers_and_messages_of_a_pipeline_do_not_block_each_other() -> None:
    run_on_ranks(compare, 4, [("zb_v", 2, True, 1), ("looped_breadth_first", 2, False, 1)])


def test_old_keywords_are_hooks() -> None:
    called = []
    schedule = build_schedule("pipedream", 1, 2, num_steps=1)
    options = {"pp_group": None, "loss_fn": loss_fn, "reduce_gradients": lambda stage: called.append(f"reduce {stage}")}
    executor = PipelineExecutor(
        schedule, {0: nn.Linear(2, 2)}, update=lambda stage, index: called.append(f"update {stage} {index}"), **options
    )
    data = [torch.ones(1, 2)] * 2
    executor.step(data, data, loss_divisor=1)
    assert called == ["reduce 0", "update 0 0", "reduce 0", "update 0 1"]
    with pytest.raises(InputError, match=r"hooks= is given, and so is reduce_gradients="):
        PipelineExecutor(schedule, {0: nn.Linear(2, 2)}, hooks=StageFunctions(), **options)
    with pytest.raises(InputError, match=r"update=None must be given for pipedream"):
        PipelineExecutor(schedule, {0: nn.Linear(2, 2)}, **options)
