"""Start here when the record of collectives misses one, or counts wrong bytes."""

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fused_megatron.observe.record_communication import Communication, record_communication
from fused_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from fused_megatron.testing import run_on_ranks


def all_kinds(rank, world_size):
    x = torch.ones(4)
    with record_communication() as seen:
        dist.all_reduce(x)
        torch.ones(2, 2) @ torch.ones(2, 2)
        dist.all_gather_single(torch.empty(8), x)
        dist.reduce_scatter_single(torch.empty(2), x, async_op=True).wait()
        dist.all_reduce(x)
    dist.all_reduce(x)  # not recorded
    return dict(seen.counts), dict(seen.elements), seen.order


def test_counts_elements_and_order():
    counts, elements, order = run_on_ranks(all_kinds, 2)[1]
    assert counts == {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
    assert elements == {"all_reduce": 8, "all_gather": 4, "reduce_scatter": 4}
    assert order == ["all_reduce", "mm", "all_gather", "reduce_scatter", "all_reduce"]


def layers(rank, world_size):
    group = dist.new_group([0, 1])
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("up", ColumnParallelLinear(8, 16, tp_group=group, overlap=False))
    model.add_module("down", RowParallelLinear(16, 8, tp_group=group, overlap=False))
    x = torch.randn(3, 8, requires_grad=True)
    with record_communication() as ledger:
        y = model(x)
        y.sum().backward()
        dist.broadcast(torch.zeros(2, dtype=torch.float64), 0)
    return ledger.entries, ledger.table()


def test_group_bytes_layer_and_direction():
    for entries, table in run_on_ranks(layers, 2):
        assert entries == [
            Communication("all_reduce", 24, 96, (0, 1), "down", False),
            Communication("all_reduce", 24, 96, (0, 1), "up", True),
            Communication("broadcast", 2, 16, (0, 1), "", False),
        ]
        assert "| up | backward | all_reduce | 0,1 | 1 | 96 |" in table.splitlines()


def of_a_fake_group(rank, world_size):
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=512)
    layer = ColumnParallelLinear(8, 1024, tp_group=dist.group.WORLD, sequence_parallel=True, overlap=False)
    with record_communication() as ledger:
        layer(torch.zeros(2, 1, 8, requires_grad=True)).sum().backward()
    return ledger.num_bytes, {len(entry.group) for entry in ledger.entries}


def test_a_fake_group_of_many_ranks():
    ((num_bytes, sizes),) = run_on_ranks(of_a_fake_group, 1)
    assert num_bytes == {"all_gather": 2 * 512 * 2 * 8 * 4, "reduce_scatter": 512 * 2 * 8 * 4} and sizes == {512}
