"""Start here when an overlapped product reads data before it arrives, or frees data that a transfer still reads.

Here data is NaN until its transfer was waited for, and data that is freed early is changed. So a missing wait fails a
test on a CPU, and is not a race on a cluster.
"""

import os

import pytest
import torch
import torch.distributed as dist

from fused_megatron.collectives.transfers import Transfer
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear, parallel_mlp
from fused_megatron.testing import run_on_ranks
from fused_megatron.testing.run_on_ranks import RankError

H, FFN, S = 8, 12, 12


class LateWork:
    """Collective that shows its result only after wait(), and checks that its source does not change until then."""

    under_way = 0

    def __init__(self, result, source):
        self.result, self.source = result, source
        self.values, self.sent = result.clone(), None if source is None else source.clone()
        result.fill_(float("nan"))
        LateWork.under_way += 1

    def wait(self):
        assert self.result.isnan().all(), "written while a transfer was filling it"
        assert self.source is None or torch.equal(self.source, self.sent), "written while a transfer was reading it"
        self.result.copy_(self.values)
        LateWork.under_way -= 1


def make_collectives_late():
    all_reduce, all_gather, all_to_all = dist.all_reduce, dist.all_gather_single, dist.all_to_all_single

    def late_all_reduce(x, *args, async_op=False, **kwargs):
        all_reduce(x, *args, **kwargs)
        return LateWork(x, None) if async_op else None

    def late(collective):
        def call(result, source, *args, async_op=False, **kwargs):
            collective(result, source, *args, **kwargs)
            return LateWork(result, source) if async_op else None

        return call

    dist.all_reduce, dist.all_gather_single = late_all_reduce, late(all_gather)
    dist.all_to_all_single = late(all_to_all)


def layers_and_mlp(sequence_parallel, overlap):
    options = {"tp_group": dist.group.WORLD, "sequence_parallel": sequence_parallel, "overlap": overlap}
    torch.manual_seed(1)
    up, down = ColumnParallelLinear(H, FFN, **options), RowParallelLinear(FFN, H, **options)
    results = []
    for step in (
        lambda x: down(torch.tanh(up(x))),
        lambda x: parallel_mlp(x, up.weight, up.bias, down.weight, down.bias, **options),
    ):
        x = torch.randn(S, 1, H, requires_grad=True)
        y = step(x)
        y.square().sum().backward()
        results += [y.detach(), x.grad, *(p.grad for p in (*up.parameters(), *down.parameters()))]
        up.zero_grad()
        down.zero_grad()
    return results


def late_against_prompt(rank, ranks):
    cases = [(s, c) for s in (False, True) for c in (False, 3)]
    prompt = [layers_and_mlp(*case) for case in cases]
    make_collectives_late()
    late = [layers_and_mlp(*case) for case in cases]
    assert LateWork.under_way == 0, "a transfer that nobody waited for"
    for mine, wanted in zip(late, prompt, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))
    # The test can fail: without its waits every case gives NaN.
    Transfer.wait = lambda self: self._result(self._buffers[0])
    return [any(bool(t.isnan().any()) for t in layers_and_mlp(*case)) for case in cases]


def test_nothing_is_read_before_its_transfer_is_done():
    assert run_on_ranks(late_against_prompt, 2) == [[True] * 4] * 2


class DiesAtProduct(record_communication):
    def __init__(self, number):
        super().__init__()
        self.left = number

    def at_product(self):
        self.left -= 1
        if self.left == 0:
            os._exit(7)


def dies_inside(rank, ranks, number):
    with DiesAtProduct(number if rank == 1 else -1):
        layers_and_mlp(True, 3)


@pytest.mark.parametrize("number", [2, 25])
def test_a_rank_that_dies_inside_leaves_an_error_and_no_hang(number):
    with pytest.raises(RankError, match="rank 1 died with exit code 7") as info:
        run_on_ranks(dies_inside, 2, number)
    assert set(info.value.errors) == {0} and info.value.silent == ()
