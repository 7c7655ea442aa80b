"""Start here when gloo's reduce-scatter adds in another order, rounds twice, or sends too much."""

import torch
import torch.distributed as dist

from fused_megatron.collectives.transfers import start_reduce_scatter, start_reduce_scatter_blocks
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.testing import run_on_ranks


def reduce_scatters(rank, ranks):
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        all_x = torch.randn(ranks, 4 * ranks, 3, generator=torch.Generator().manual_seed(1)).to(dtype) * 1e3
        x = all_x[rank].clone()
        with record_communication() as ledger:
            mine = start_reduce_scatter(x, 0, dist.group.WORLD).wait()
        assert ledger.counts == {"reduce_scatter": 1}
        assert ledger.num_bytes == {"reduce_scatter": x.numel() * x.element_size()}
        wanted = all_x[:, 4 * rank : 4 * rank + 4].to(torch.float32 if dtype == torch.bfloat16 else dtype)
        total = wanted[0]
        for other in wanted[1:]:
            total = total + other
        assert torch.equal(mine, total.to(dtype)) and torch.equal(x, all_x[rank])
        # Some of the rows give the same bits: the order of a sum does not depend on the index in the message.
        shard = x.new_empty(1, 3)
        start_reduce_scatter_blocks(x[3::4].contiguous(), shard, dist.group.WORLD).wait()
        assert torch.equal(shard, mine[3:])
        results.append(start_reduce_scatter(x[:0], 0, dist.group.WORLD).wait().shape)
    return results


def test_reduce_scatter_adds_in_the_order_of_the_ranks():
    assert run_on_ranks(reduce_scatters, 3) == [[(0, 3)] * 3] * 3
