"""Start here when an asynchronous schedule computes with the wrong version of the weights, or keeps too many."""

import pytest
import torch
from torch import nn

import fused_megatron as fm
from fused_megatron.pipeline import PipelineExecutor, build_schedule
from fused_megatron.pipeline.schedule.action import peak_weight_versions, weight_versions
from fused_megatron.testing.run_on_ranks import run_on_ranks

WIDTH, STEPS = 5, 3


def make_stages(count):
    torch.manual_seed(2)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(count)]


def make_optimizer(stage):
    return torch.optim.SGD(stage.parameters(), lr=0.2, momentum=0.9)


def data(count):
    generator = torch.Generator().manual_seed(4)
    return [tuple(torch.randn(2, 3, WIDTH, generator=generator)) for _ in range(count)]


def loss_fn(y, target):
    return (y - target).square().sum()


def simulate(schedule):
    """Return losses and weights of one process that keeps every version of every stage's weights."""
    stages = make_stages(schedule.num_stages)
    optimizers = [make_optimizer(stage) for stage in stages]
    versions = [[[p.detach().clone() for p in stage.parameters()]] for stage in stages]
    used = weight_versions(schedule)
    every = 1 if schedule.weights == "stashed" else schedule.num_microbatches
    losses = []

    def show(stage, version):
        for parameter, value in zip(stages[stage].parameters(), versions[stage][version], strict=True):
            parameter.data.copy_(value)

    for m, (x, target) in enumerate(data(len(schedule.microbatches))):
        for stage in range(len(stages)):
            show(stage, used[stage, m])
        loss = loss_fn(nn.Sequential(*stages)(x), target)
        (loss / 7).backward()
        losses.append(loss.item())
        if (m + 1) % every == 0:
            for stage, optimizer in enumerate(optimizers):
                show(stage, -1)
                optimizer.step()
                optimizer.zero_grad()
                versions[stage].append([p.detach().clone() for p in stages[stage].parameters()])
    return losses, [values[-1] for values in versions]


def run_asynchronous(rank, world_size, name, count):
    mesh = fm.init_mesh(pipeline_parallel_size=world_size)
    schedule = build_schedule(name, world_size, count, num_steps=STEPS)
    stage = make_stages(world_size)[rank]
    optimizer, most, pointers = make_optimizer(stage), [1], []

    def update(index, number):
        assert (index, number) == (rank, len(pointers))
        optimizer.step()
        optimizer.zero_grad()
        pointers.append(stage[0].weight.data_ptr())

    def observe(action, start, end):
        most.append(executor.stashed[rank].num_versions)

    executor = PipelineExecutor(
        schedule, {rank: stage}, pp_group=mesh.pp_group, loss_fn=loss_fn, update=update, observe=observe
    )
    pairs = data(len(schedule.microbatches))
    loss = executor.step([x for x, _ in pairs], [target for _, target in pairs], loss_divisor=7)
    assert loss.item() == pytest.approx(sum(executor.microbatch_losses.tolist()) / 7, rel=1e-12)
    assert max(most) == peak_weight_versions(executor.schedule)[rank]
    executor.close()
    return executor.microbatch_losses, [p.detach() for p in stage.parameters()]


@pytest.mark.parametrize(("name", "ranks", "count"), [("pipedream", 3, 2), ("pipedream_2bw", 2, 3)])
def test_weights_are_those_of_the_update_rule(name, ranks, count):
    losses, weights = simulate(build_schedule(name, ranks, count, num_steps=STEPS))
    plain = simulate(build_schedule("pipedream", 1, count, num_steps=STEPS))[1]
    for rank, (mine, values) in enumerate(run_on_ranks(run_asynchronous, ranks, name, count)):
        assert mine.tolist() == losses
        for value, wanted, other in zip(values, weights[rank], plain[0], strict=True):
            assert torch.equal(value, wanted)
            assert not torch.equal(value, other)
