"""Start here when the weights of a pipeline differ from the weights of one process by a bit."""

import inspect
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_megatron as fm
from fused_megatron.pipeline import SCHEDULES, PipelineExecutor, build_schedule
from fused_megatron.pipeline.schedule.action import stages_of
from fused_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from fused_megatron.testing.run_on_ranks import run_on_ranks
from fused_megatron.testing.strict_channels import StrictChannels

VOCABULARY, HIDDEN, CELLS, STEPS = 13, 8, 8, 2
SYNCHRONOUS = [name for name, kind in SCHEDULES.items() if kind.weights == "synchronous"]


class Cell(nn.Module):
    """Residual MLP; the first cell looks tokens up, the last returns logits."""

    def __init__(self, index, parallel, recompute):
        super().__init__()
        up, down = (ColumnParallelLinear, RowParallelLinear) if parallel else (nn.Linear, nn.Linear)
        options = {"tp_group": None} if parallel else {}
        self.recompute = recompute
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN) if index == 0 else None
        self.norm = nn.LayerNorm(HIDDEN)
        self.up, self.down = up(HIDDEN, 12, **options), down(12, HIDDEN, **options)
        self.head = up(HIDDEN, VOCABULARY, bias=False, **options) if index == CELLS - 1 else None

    def block(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x):
        if self.embedding is not None:
            x = self.embedding(x)
        x = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        return x if self.head is None else self.head(x)


def make_cells(parallel=False, recompute=False):
    torch.manual_seed(0)
    cells = [Cell(index, parallel, recompute) for index in range(CELLS)]
    for parameter in (p for cell in cells for p in cell.parameters()):
        nn.init.normal_(parameter, std=0.3)
    cells[-1].head.weight.data.copy_(cells[0].embedding.weight.data)
    return cells


def microbatches(count, step):
    """Return tokens and targets of uneven microbatches with different lengths."""
    generator = torch.Generator().manual_seed(step)
    sizes = [(1 + index % 3, 2 + (index + step) % 4) for index in range(count)]
    draw = [torch.randint(VOCABULARY, (2, *size), generator=generator) for size in sizes]
    return [pair[0] for pair in draw], [pair[1] for pair in draw]


def loss_fn(logits, target):
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="sum")


def make_optimizer(parameters, name):
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def one_process(count, optimizer_name, parallel):
    """Return losses and cells of one process; gradients of both uses of the tied weight accumulate separately."""
    cells = make_cells(parallel)
    model = nn.Sequential(*cells)
    optimizer = make_optimizer(model.parameters(), optimizer_name)
    losses = []
    for step in range(STEPS):
        inputs, targets = microbatches(count, step)
        divisor, total = sum(target.numel() for target in targets), 0.0
        optimizer.zero_grad()
        for x, target in zip(inputs, targets, strict=True):
            loss = loss_fn(model(x), target)
            (loss / divisor).backward()
            total += loss.item()
        tied = cells[0].embedding.weight, cells[-1].head.weight
        both = tied[0].grad + tied[1].grad
        for weight in tied:
            weight.grad.copy_(both)
        optimizer.step()
        losses.append(total / divisor)
    return losses, [cell.state_dict() for cell in cells]


def piped(pp_group, rank, schedule, optimizer_name, parallel, recompute, strict):
    """Return losses and this rank's cells by index; strict: over a transport as strict as NCCL can be."""
    cells = make_cells(parallel, recompute)
    count, ends = schedule.num_stages, {}
    for stage in stages_of(schedule.placement, rank):
        ends[stage] = (stage * CELLS // count, (stage + 1) * CELLS // count)
    stages = {stage: nn.Sequential(*cells[begin:end]) for stage, (begin, end) in ends.items()}
    tied = {}
    if 0 in stages:
        tied[0] = cells[0].embedding.weight
    if count - 1 in stages:
        tied[count - 1] = cells[-1].head.weight
    transport = StrictChannels(pp_group) if strict else None
    executor = PipelineExecutor(schedule, stages, pp_group=pp_group, loss_fn=loss_fn, tied=[tied], transport=transport)
    optimizer = make_optimizer([p for stage in stages.values() for p in stage.parameters()], optimizer_name)
    losses = []
    for step in range(STEPS):
        inputs, targets = microbatches(schedule.num_microbatches, step)
        optimizer.zero_grad()
        losses.append(executor.step(inputs, targets, loss_divisor=sum(t.numel() for t in targets)).item())
        assert executor.num_live == 0
        optimizer.step()
    executor.close()
    assert transport is None or transport.crossed == []
    return losses, {i: cells[i].state_dict() for begin, end in ends.values() for i in range(begin, end)}


def run_cases(rank, world_size, cases, strict):
    """Return this rank's result for each case; the first rank adds the result of one process."""
    mesh = fm.init_mesh(pipeline_parallel_size=world_size)
    results, expected = [], {}
    for name, count, optimizer_name, parallel, recompute in cases:
        per_rank = SCHEDULES[name].stages_per_rank or 2
        tied = ((0, world_size * per_rank - 1),)
        schedule = build_schedule(name, world_size, count, per_rank, tied=tied)
        results.append(piped(mesh.pp_group, rank, schedule, optimizer_name, parallel, recompute, strict))
        key = (count, optimizer_name, parallel)
        if rank == 0 and key not in expected:
            expected[key] = one_process(*key)
    return results, expected


@pytest.mark.parametrize(
    ("ranks", "count"), [(3, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 5), (4, 9)))]
)
def test_weights_are_those_of_one_process(ranks, count):
    check_weights(ranks, count, strict=False)


@pytest.mark.parametrize("count", [pytest.param(9, marks=pytest.mark.slow), 2])
def test_weights_are_those_of_one_process_where_messages_keep_their_order(count):
    """Send one message at a time on each channel, in order, without buffers or tags: a deadlock here could be NCCL's.

    With fewer microbatches than ranks some ranks idle while others warm up.
    """
    check_weights(4, count, strict=True)


def check_weights(ranks, count, strict):
    cases = []
    for index, name in enumerate(SYNCHRONOUS):
        cases.append((name, count, ("sgd", "adamw")[index % 2], bool(index % 3), bool(index % 4 == 1)))
    answers = run_on_ranks(run_cases, ranks, cases, strict)
    expected = answers[0][1]
    for index, (name, count, optimizer_name, parallel, _) in enumerate(cases):
        losses, cells = expected[count, optimizer_name, parallel]
        seen = set()
        for results, _ in answers:
            got, mine = results[index]
            torch.testing.assert_close(got, losses, rtol=1e-12, atol=0)
            for cell, state in mine.items():
                seen.add(cell)
                for key, value in state.items():
                    assert torch.equal(value, cells[cell][key]), (name, count, cell, key)
        assert seen == set(range(CELLS))


def run_example(rank, world_size):
    mesh = fm.init_mesh(pipeline_parallel_size=world_size)
    torch.manual_seed(0)
    batches = [(torch.randn(32, 8), torch.randn(32, 1)) for _ in range(2)]
    documented = inspect.cleandoc(PipelineExecutor.__doc__)
    code = textwrap.dedent(documented.split("any modules.\n")[1].split("\nGradients accumulate")[0])
    names = {"mesh": mesh, "rank": rank, "batches": batches, "torch": torch, "nn": nn}
    exec(code, names | {"build_schedule": build_schedule, "PipelineExecutor": PipelineExecutor}, found := {})
    return found["loss"].item()


def test_example_of_the_docstring_runs():
    first, second = run_on_ranks(run_example, 2)
    assert first == second > 0
