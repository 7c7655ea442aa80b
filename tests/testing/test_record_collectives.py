import torch
import torch.distributed as dist

from fused_megatron.testing import record_collectives, run_on_ranks


def all_kinds(rank, world_size):
    x = torch.ones(4)
    with record_collectives() as seen:
        dist.all_reduce(x)
        torch.ones(2, 2) @ torch.ones(2, 2)
        dist.all_gather_single(torch.empty(8), x)
        dist.reduce_scatter_single(torch.empty(2), x, async_op=True).wait()
        dist.all_reduce(x)
    dist.all_reduce(x)  # not seen
    return dict(seen.counts), dict(seen.elements), seen.order


def test_counts_elements_and_order():
    counts, elements, order = run_on_ranks(all_kinds, 2)[1]
    assert counts == {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
    assert elements == {"all_reduce": 8, "all_gather": 4, "reduce_scatter": 4}
    assert order == ["all_reduce", "mm", "all_gather", "reduce_scatter", "all_reduce"]
