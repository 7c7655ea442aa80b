"""Start here when a forward sees weights of the step before, or a gather is not under the forward."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.data_parallel.weight_gather import WeightGather
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.sharding import Replicas, ReplicaSet, RowShards
from fused_megatron.testing.run_on_ranks import run_on_ranks


class Model(nn.Module):
    """A first layer, a list of blocks, a parameter of its own; sizes that two and three ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.randn(()))
        self.first = nn.Linear(4, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) * self.scale
        for block in self.blocks:
            x = block(x)
        return x


def gathered(rank: int, world_size: int) -> dict[str, Any]:
    """Each rank changes its rows and spoils the others; what a forward then gives, and what was sent when."""
    model, wanted = Model(), Model()
    rows = RowShards(world_size, rank)
    buckets = [[model.scale, *model.first.parameters()], *([*block.parameters()] for block in model.blocks)]
    both = ReplicaSet(rows, shard_group=dist.group.WORLD, group=dist.group.WORLD)
    gather = WeightGather(buckets, Replicas(both, both))
    gather.watch(model)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    sent: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: sent.append(ledger.counts["all_gather"]))
    same = []
    with torch.no_grad():
        for _ in range(2):
            for p, other in zip(model.parameters(), wanted.parameters(), strict=True):
                other.add_(1)
                p.fill_(torch.nan)
                rows.own(p.detach()).copy_(rows.own(other.detach()))
            sent.clear()
            with record_communication() as ledger:
                gather.start()
                same.append(torch.equal(model(x), wanted(x)))
                gather.finish()
            same += [torch.equal(p, other) for p, other in zip(model.parameters(), wanted.parameters(), strict=True)]
    return {"same": same, "sent": list(sent), "ledger": dict(ledger.num_bytes)}


def test_a_forward_waits_for_its_weights_only_and_sends_the_next_bucket_first() -> None:
    for world_size in (2, 3):
        for found in run_on_ranks(gathered, world_size):
            assert all(found["same"])
            # When block i is through, the bucket of block i + 1 has been sent, and no other.
            assert found["sent"] == [3, 4, 4]
            # Whole parameters, in float32, with what fills the last block up.
            assert found["ledger"]["all_gather"] >= 4 * sum(p.numel() for p in Model().parameters())


def gathered_without_ranks(rank: int, world_size: int) -> bool:
    model = Model()
    before = [p.detach().clone() for p in model.parameters()]
    gather = WeightGather([list(model.parameters())], Replicas())
    gather.watch(model)
    gather.start()
    model(torch.zeros(1, 4))
    return all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_one_rank_gathers_nothing() -> None:
    assert run_on_ranks(gathered_without_ranks, 1) == [True]
