"""Start here when PipeDream or PipeDream-2BW does not follow its update rule."""

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.pipeline import build_schedule
from fused_megatron.pipeline.run.executor import PipelineExecutor
from fused_megatron.testing import run_on_ranks

RANKS, HIDDEN, ROWS, LR, MOMENTUM = 3, 6, 4, 0.05, 0.9
# (schedule, microbatches of a step, steps in one call)
CASES = [("pipedream_2bw", 3, 5), ("pipedream_2bw", 4, 1), ("pipedream", 1, 1), ("pipedream", 4, 2)]
CALLS = 2
MORE_STEPS = 2  # in the last call, with a divisor of their own each


def layers():
    """Make one layer for each stage."""
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh()).double() for _ in range(RANKS)]


def data(call, count):
    generator = torch.Generator().manual_seed(call)
    drawn = torch.randn(2, count, ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    return drawn[0].unbind(), drawn[1].unbind()


def divisors(steps):
    return [11.0 + step for step in range(steps)]


def square(y, target):
    return (y - target).square().sum()


def run_cases(rank, world_size):
    return [run_case(rank, *case) for case in CASES]


def run_case(rank, name, microbatches, steps):
    stage = layers()[rank]
    optimizer = torch.optim.SGD(stage.parameters(), LR, MOMENTUM)
    updates = []

    def update(index, number):
        assert index == rank
        updates.append(number)
        optimizer.step()
        optimizer.zero_grad()

    schedule = build_schedule(name, RANKS, microbatches, num_steps=steps)
    executor = PipelineExecutor(
        schedule, {rank: stage}, pp_group=dist.group.WORLD, loss_fn=square if rank == RANKS - 1 else None, update=update
    )
    losses = []
    for call in range(CALLS):
        inputs, targets = data(call, microbatches * steps)
        losses.append(executor.step(inputs, targets, loss_divisor=microbatches * ROWS).item())
    inputs, targets = data(CALLS, microbatches * MORE_STEPS)
    losses.append(executor.step(inputs, targets, loss_divisor=divisors(MORE_STEPS)).item())
    executor.close()
    return losses, updates, [p.detach() for p in stage.parameters()]


def gradients(weights, x, target, divisor):
    """Return the loss of a microbatch, and the gradient of every stage's weights [(w, b), ..]."""
    leaves = [[t.clone().requires_grad_() for t in stage] for stage in weights]
    y = x
    for weight, bias in leaves:
        y = torch.tanh(y @ weight.t() + bias)
    loss = square(y, target) / divisor
    flat = torch.autograd.grad(loss, [t for stage in leaves for t in stage])
    return loss.item(), [list(flat[2 * s : 2 * s + 2]) for s in range(RANKS)]


class Weights:
    """Versions of one stage's weights, by the number of updates; SGD with momentum.

    The versions go on from call to call: a rule that restarts with a call would depend on the size of the calls.
    """

    def __init__(self, layer):
        self.versions = [[p.detach() for p in layer.parameters()]]
        self.velocity = [torch.zeros_like(p) for p in self.versions[0]]

    def update(self, gradient):
        self.velocity = [MOMENTUM * v + g for v, g in zip(self.velocity, gradient, strict=True)]
        self.versions.append([w - LR * v for w, v in zip(self.versions[-1], self.velocity, strict=True)])


def play_2bw(stages, inputs, targets, microbatches, divisors):
    """Play w(t + 1) = w(t) - lr g(w(t - 1)) on all stages; the first step uses w(0)."""
    total = 0.0
    for step, divisor in enumerate(divisors):
        old = [stage.versions[-2:][0] for stage in stages]
        summed = [[torch.zeros_like(w) for w in stage] for stage in old]
        for m in range(step * microbatches, (step + 1) * microbatches):
            loss, found = gradients(old, inputs[m], targets[m], divisor)
            total += loss
            summed = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(summed, found, strict=True)]
        for stage, gradient in zip(stages, summed, strict=True):
            stage.update(gradient)
    return total


def play_stashing(stages, inputs, targets, divisors):
    """Play w_s(t + 1) = w_s(t) - lr g_s(w_0(t - n + 1), .., w_n-1(t)).

    Microbatch t uses weights of stage s that are n - 1 - s updates old, the number of later stages.
    """
    total = 0.0
    for t, (x, target) in enumerate(zip(inputs, targets, strict=True)):
        old = [stage.versions[-(RANKS - s) :][0] for s, stage in enumerate(stages)]
        loss, found = gradients(old, x, target, divisors[t * len(divisors) // len(inputs)])
        total += loss
        for stage, gradient in zip(stages, found, strict=True):
            stage.update(gradient)
    return total


def test_weights_are_those_of_the_update_rule():
    answers = run_on_ranks(run_cases, RANKS)
    for index, (name, microbatches, steps) in enumerate(CASES):
        stages = [Weights(layer) for layer in layers()]
        for call in range(CALLS + 1):
            count = steps if call < CALLS else MORE_STEPS
            inputs, targets = data(call, microbatches * count)
            of_steps = [microbatches * ROWS] * count if call < CALLS else divisors(count)
            if name == "pipedream_2bw":
                loss = play_2bw(stages, inputs, targets, microbatches, of_steps)
            else:
                loss = play_stashing(stages, inputs, targets, of_steps)
            for losses, _, _ in (answer[index] for answer in answers):
                torch.testing.assert_close(losses[call], loss, rtol=1e-12, atol=0.0)
        for rank, stage in enumerate(stages):
            _, updates, got = answers[rank][index]
            every = 1 if name == "pipedream_2bw" else microbatches
            assert updates == [*range(steps * every)] * CALLS + [*range(MORE_STEPS * every)]
            for mine, right in zip(got, stage.versions[-1], strict=True):
                # Not bitwise: SGD rounds once and the formula twice, and one of the products adds the bias itself.
                torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-14)


def test_the_rules_differ_from_plain_sgd():
    """Check that the test above can tell the rules apart."""
    inputs, targets = data(0, 12)
    delayed, stashed, plain = ([Weights(layer) for layer in layers()] for _ in range(3))
    play_2bw(delayed, inputs, targets, 1, [ROWS] * 12)
    play_stashing(stashed, inputs, targets, [ROWS] * 12)
    for x, target in zip(inputs, targets, strict=True):
        _, found = gradients([stage.versions[-1] for stage in plain], x, target, ROWS)
        for stage, gradient in zip(plain, found, strict=True):
            stage.update(gradient)
    for other in (delayed, stashed):
        assert (other[0].versions[-1][0] - plain[0].versions[-1][0]).abs().max() > 1e-3
