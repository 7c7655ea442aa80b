"""Start here when a stage fails because it reuses memory, ignores tensors, or has nothing to train."""

import pytest
import torch
from torch import nn

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.pipeline import PipelineExecutor, build_schedule
from fused_megatron.pipeline.schedule.action import stages_of
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.testing.strict_channels import StrictChannels

WIDTH, COUNT, STAGES = 4, 5, 4


class Static(torch.autograd.Function):
    """Identity that returns x, and its gradient, in memory that every call overwrites, as a CUDA graph does."""

    @staticmethod
    def forward(ctx, x, memory, gradients):
        ctx.gradients = gradients
        return memory.copy_(x).detach()

    @staticmethod
    def backward(ctx, dy):
        return ctx.gradients.copy_(dy), None, None


class Stage(nn.Module):
    """Stage of a case; the last stage returns one tensor, the others a tuple of two."""

    def __init__(self, index, case):
        super().__init__()
        self.index, self.case = index, case
        self.linear, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.memory = [torch.zeros(2, WIDTH) for _ in range(4)]

    def forward(self, x, y=None, used=True):
        y = x if y is None else y
        a, b = self.linear(x), self.other(y)
        if self.case == "static":
            a, b = Static.apply(a, *self.memory[:2]), Static.apply(b, *self.memory[2:])
        if self.index < STAGES - 1:
            return a, b
        return a + b if used and self.case != "unused" else a


def make_stages(case):
    torch.manual_seed(5)
    return [Stage(index, case) for index in range(STAGES)]


def loss_fn(y, target):
    """Return the loss, a constant for a microbatch without targets."""
    return (y - target).square().sum() if len(target) else torch.zeros(())


class StaticLoss:
    """Loss whose result is always in the same memory."""

    def __init__(self):
        self.memory = [torch.zeros(()), torch.zeros(())]

    def __call__(self, y, target):
        return Static.apply(loss_fn(y, target), *self.memory)


def data(case):
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(2, COUNT, 2, WIDTH, generator=generator).unbind()
    targets = list(targets)
    if case == "no targets":
        targets[1] = targets[1][:0]
    # Tensors, on which shapes do not depend, so that no rank knows their values.
    used = [torch.tensor(case != "sometimes" or index == 3) for index in range(COUNT)]
    return list(inputs), targets, used


CASES = ("static", "unused", "sometimes", "no targets")


def one_process(case):
    """Return losses, gradients and weights after two steps."""
    stages, losses = make_stages(case), []
    parameters = {f"{i}.{name}": p for i, stage in enumerate(stages) for name, p in stage.named_parameters()}
    adamw = torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.5)
    inputs, targets, used = data(case)
    for _ in range(2):
        adamw.zero_grad()
        for x, target, use in zip(inputs, targets, used, strict=True):
            for stage in stages[:-1]:
                x = stage(*x) if isinstance(x, tuple) else stage(x)
            loss = loss_fn(stages[-1](*x, used=use), target)
            losses.append(loss.item())
            if loss.requires_grad:
                (loss / 3).backward()
        adamw.step()
    return losses, {name: p.grad for name, p in parameters.items()}, {n: p.detach() for n, p in parameters.items()}


class WithoutFlag(nn.Module):
    """Stage that ignores the keyword arguments of the last stage."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, *x, used):
        return self.stage(*x, used=used) if self.stage.index == STAGES - 1 else self.stage(*x)


def piped(rank, world_size, schedules):
    mesh = fm.init_mesh(pipeline_parallel_size=world_size)
    found = {}
    for case in CASES:
        for name, strict in schedules:
            schedule = build_schedule(name, world_size, COUNT, STAGES // world_size)
            mine = {i: s for i, s in enumerate(make_stages(case)) if i in stages_of(schedule.placement, rank)}
            executor = PipelineExecutor(
                schedule,
                {i: WithoutFlag(stage) for i, stage in mine.items()},
                pp_group=mesh.pp_group,
                loss_fn=StaticLoss() if case == "static" else loss_fn,
                transport=StrictChannels(mesh.pp_group) if strict else None,
            )
            parameters = {f"{i}.{n}": p for i, stage in mine.items() for n, p in stage.named_parameters()}
            adamw, losses = torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.5), []
            inputs, targets, used = data(case)
            for _ in range(2):
                adamw.zero_grad()
                executor.step(inputs, targets, loss_divisor=3, stage_kwargs=[{"used": use} for use in used])
                losses += executor.microbatch_losses.tolist()
                adamw.step()
            weights = {n: p.detach() for n, p in parameters.items()}
            found[case, name, strict] = losses, {n: p.grad for n, p in parameters.items()}, weights
            executor.close()
    return found


def test_losses_gradients_and_weights_are_those_of_one_process():
    """Run stages on two ranks and on one, with static memory, unused tensors, and a microbatch without targets."""
    # In zb_v the two middle stages are neighbours on one rank, and weight gradients are deferred.
    every = run_on_ranks(piped, 2, [("interleaved_1f1b", True), ("zb_v", False)], timeout_s=100)
    for case in CASES:
        losses, gradients, weights = one_process(case)
        assert (gradients["3.other.weight"] is None) == (case == "unused")
        for found in every:
            for key, (mine, my_gradients, my_weights) in found.items():
                if key[0] != case:
                    continue
                assert mine == pytest.approx(losses, rel=1e-5), key
                for name, gradient in my_gradients.items():
                    assert (gradient is None) == (gradients[name] is None), (key, name)
                    torch.testing.assert_close(gradient, gradients[name], rtol=1e-5, atol=1e-6)
                    torch.testing.assert_close(my_weights[name], weights[name], rtol=1e-4, atol=1e-5)


def fail(rank, world_size):
    mesh = fm.init_mesh(pipeline_parallel_size=world_size)
    texts = []

    def step(stage, function="step", **options):
        executor = PipelineExecutor(
            build_schedule("1f1b", world_size, 2), {rank: stage}, pp_group=mesh.pp_group, loss_fn=loss_fn
        )
        x = [torch.ones(2, WIDTH)] * 2
        try:
            getattr(executor, function)(x, x, loss_divisor=1)
            texts.append(None)
        except (InputError, fm.pipeline.PipelineError) as error:
            texts.append(str(error))

    frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    step(frozen)
    step(frozen, "evaluate")
    step(nn.Linear(WIDTH, WIDTH) if rank == 1 else frozen)
    step(nn.ReLU(inplace=True) if rank == 1 else nn.Linear(WIDTH, WIDTH))
    return texts


def test_nothing_to_train_and_an_input_changed_in_place_are_one_line():
    first, second = run_on_ranks(fail, 2, timeout_s=100)
    text = "no parameter of any stage requires a gradient, and no input: there is nothing to train"
    assert first[0] == second[0] and first[0].startswith(text)
    assert first[1:3] == second[1:3] == [None, None]
    text = "a stage changes its input in place, which autograd forbids"
    assert second[3].startswith(text) and f"rank 1 failed at 1F0: InputError: {text}" in first[3]


def test_one_rank_with_nothing_to_train():
    executor = PipelineExecutor(
        build_schedule("1f1b", 1, 1), {0: nn.Linear(2, 2).requires_grad_(False)}, pp_group=None, loss_fn=loss_fn
    )
    x = torch.ones(1, 2)
    with pytest.raises(InputError, match="there is nothing to train"):
        executor.step([x], [x], loss_divisor=1)
    assert executor.evaluate([x], [x]) > 0
    executor.step([x.clone().requires_grad_()], [x], loss_divisor=1)
