"""Start here when tensor-parallel ranks that share the messages of a pipeline send wrong parts, or too many bytes."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.pipeline import SCHEDULES, PipelineExecutor, build_schedule
from fused_megatron.pipeline.run.message_parts import MessageParts
from fused_megatron.pipeline.schedule.action import stages_of
from fused_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from fused_megatron.testing.run_on_ranks import run_on_ranks

WIDTH, TP, PP, COUNT = 5, 3, 2, 4
KEYS = ("losses", "weights")
FAST = ("1f1b", "zb_v", "pipedream_2bw")


class Stage(nn.Module):
    """Tensor-parallel MLP that also hands on integers, a mask, half precision, a scalar and a transposed view."""

    def __init__(self, index, tp_group):
        super().__init__()
        self.up = ColumnParallelLinear(WIDTH, 2 * TP, tp_group=tp_group, overlap=False, init_std=0.5)
        self.down = RowParallelLinear(2 * TP, WIDTH, tp_group=tp_group, overlap=False, init_std=0.5)
        for number, layer in enumerate((self.up, self.down)):
            layer.reset_parameters(seed=10 * index + number)
        self.index = index

    def forward(self, x, *rest, last):
        if rest:
            ids, mask, half, scale = rest
            x = torch.where(mask.unsqueeze(1), half.float(), ids.unsqueeze(1)) + x.t() * scale
        y = x + self.down(F.gelu(self.up(x)))
        if self.index == last:
            return y
        return y.t(), torch.arange(len(y)), y[:, 0] > 0, y.to(torch.bfloat16), 1 + 0.1 * y.sum().tanh()


def microbatches(step):
    """Return inputs and targets; the parts of one row differ in size, and a microbatch may have no rows."""
    generator = torch.Generator().manual_seed(step)
    pairs = [torch.randn(2, rows, WIDTH, generator=generator) for rows in (3, 1, 0, 4)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def loss_fn(y, target):
    return (y - target).square().sum()


def trained(mesh, name, scatter_group):
    """Return losses, weights and the transfers of a step without headers."""
    per_rank = SCHEDULES[name].stages_per_rank or 2
    asynchronous = SCHEDULES[name].weights != "synchronous"
    schedule = build_schedule(name, PP, COUNT, per_rank)
    last = schedule.num_stages - 1
    stages = {index: Stage(index, mesh.tp_group) for index in stages_of(schedule.placement, mesh.pp_rank)}

    def update(stage, _=0):
        for parameter in stages[stage].parameters():
            if parameter.grad is not None:
                parameter.data.sub_(parameter.grad, alpha=0.001)
                parameter.grad = None

    executor = PipelineExecutor(
        schedule,
        stages,
        pp_group=mesh.pp_group,
        loss_fn=loss_fn,
        scatter_group=scatter_group,
        update=update if asynchronous else None,
    )
    losses, kwargs = [], [{"last": last}] * len(schedule.microbatches)
    for step in range(2):
        inputs, targets = microbatches(step)
        repeats = len(schedule.microbatches) // COUNT
        with record_communication() as ledger:
            losses.append(executor.step(inputs * repeats, targets * repeats, loss_divisor=7, stage_kwargs=kwargs))
        if not asynchronous:
            for stage in stages:
                update(stage)
    losses.append(executor.evaluate(inputs * repeats, targets * repeats, loss_divisor=7, stage_kwargs=kwargs))
    executor.close()
    weights = {f"{i}.{key}": value for i, stage in stages.items() for key, value in stage.state_dict().items()}
    sent = {kind: [] for kind in ("send", "receive", "all_gather")}
    for entry in ledger.entries:
        if entry.kind in sent:
            sent[entry.kind].append((entry.elements, entry.num_bytes))
    return {"losses": losses, "weights": weights, "sent": sent}


def run_schedules(rank, world_size, names):
    mesh = fm.init_mesh(tensor_parallel_size=TP, pipeline_parallel_size=PP)
    place = mesh.pp_rank, mesh.tp_rank
    return place, {name: (trained(mesh, name, None), trained(mesh, name, mesh.tp_group)) for name in names}


@cache
def found(names):
    return dict(run_on_ranks(run_schedules, TP * PP, names))


def of_schedule(name):
    """Return {(pp_rank, tp_rank): (with whole messages, with parts)}."""
    names = FAST if name in FAST else tuple(sorted({*SCHEDULES} - {*FAST}))
    return {place: of_rank[name] for place, of_rank in found(names).items()}


on_every_schedule = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in SCHEDULES]
)


@on_every_schedule
def test_parts_bring_the_same_bits(name):
    for whole, parts in of_schedule(name).values():
        torch.testing.assert_close({key: parts[key] for key in KEYS}, {key: whole[key] for key in KEYS}, rtol=0, atol=0)
        assert all(loss.isfinite() for loss in whole["losses"])


@on_every_schedule
def test_the_ranks_together_send_every_tensor_once(name):
    runs = of_schedule(name)
    for pp_rank in range(PP):
        ranks = [runs[pp_rank, tp_rank] for tp_rank in range(TP)]
        for kind in ("send", "receive"):
            once = sum(num_bytes for _, num_bytes in ranks[0][0]["sent"][kind])
            assert once > 0
            assert sum(num_bytes for _, parts in ranks for _, num_bytes in parts["sent"][kind]) == once
        for whole, parts in ranks:
            # A gather has room for equal parts.
            padded = [
                TP * -(-elements // TP) * num_bytes // elements for elements, num_bytes in whole["sent"]["receive"]
            ]
            assert sorted(padded) == sorted(num_bytes for _, num_bytes in parts["sent"]["all_gather"])
            assert whole["sent"]["all_gather"] == []


def with_wrong_groups(rank, world_size):
    """Return the errors: the ends of a message have different parts; a group does not contain this rank."""
    mesh = fm.init_mesh(pipeline_parallel_size=2)
    texts = []
    for of_second in (mesh.pp_group, dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(InputError) as error:
            PipelineExecutor(
                build_schedule("1f1b", 2, 2),
                {rank: nn.Linear(2, 2)},
                pp_group=mesh.pp_group,
                loss_fn=loss_fn,
                scatter_group=of_second if rank == 1 else None,
            )
        texts.append(str(error.value))
    return texts


def test_wrong_groups_are_said_on_every_rank():
    for different, foreign in run_on_ranks(with_wrong_groups, 2):
        assert "pipeline rank 0 is rank 0 of 1 in it, and pipeline rank 1 is rank 1 of 2" in different
        assert "does not contain this rank 1 (pass the group that init_mesh made" in foreign


def test_parts_cover_a_tensor_once():
    for ranks in (1, 2, 3, 5):
        for numel in range(12):
            x, found = torch.arange(numel), []
            for rank in range(ranks):
                parts = MessageParts(None)
                parts._rank, parts._ranks = rank, ranks
                part = parts.of(x)
                buffer = parts.new_buffer((numel,), x.dtype, x.device)
                assert buffer.numel() == -(-numel // ranks)
                assert parts.filled(buffer, (numel,)).shape == part.shape
                found.append(part)
            assert torch.equal(torch.cat(found), x)
