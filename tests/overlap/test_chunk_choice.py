"""Start here when layers choose chunks slowly, or ranks choose differently."""

import logging
import time

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fused_megatron.checks import InputError
from fused_megatron.overlap import ChunkChoice, OverlapCosts, chunk_choice
from fused_megatron.overlap.chunk_choice import _chosen
from fused_megatron.overlap.overlapped_linear import gather_product, start_product_reduce_scatter


def test_what_users_pass():
    assert chunk_choice(True) == ChunkChoice(None) and chunk_choice(False) == ChunkChoice(1)
    assert chunk_choice(3) == ChunkChoice(3)
    with pytest.raises(InputError, match="overlap=0 must be at least 1 chunk"):
        chunk_choice(0)


@pytest.fixture
def group():
    _chosen.cache_clear()
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def plays(monkeypatch):
    """Fix the costs of the group, and record every run of the cost model."""
    costs = OverlapCosts(1e12, 1e-6, 1e9, 0.0, 0.1)
    monkeypatch.setattr(ChunkChoice, "measured", lambda self, group, like: costs if self.fixed is None else None)
    found, play = [], OverlapCosts.num_chunks
    monkeypatch.setattr(OverlapCosts, "num_chunks", lambda *arguments: found.append(arguments) or play(*arguments))
    return found


def all_choices(choice, x, weight, group):
    return [
        choice.for_gather(x, weight, 0, group),
        choice.for_reduction(x, weight, 0, group),
        choice.for_reduction(x, weight, 0, group, hidden_products=2),
        *choice.for_mlp(x, 1, 2 * weight.numel(), group),
        *choice.for_mlp(x, 4, 2 * weight.numel(), group),
        choice.for_exchange(x, x.numel() // x.shape[-1], 2 * weight.numel(), group),
    ]


def test_the_model_runs_once_for_each_shape(group, plays, caplog):
    caplog.set_level(logging.INFO, "fused_megatron.overlap.chunk_choice")
    x, weight = torch.empty(4096, 1, 128), torch.empty(256, 128)
    first = all_choices(ChunkChoice(), x, weight, group)
    assert max(first) > 1 and len(plays) == len(caplog.records) == 7
    assert "overlap over 4 ranks: 4096 rows in" in caplog.text
    assert all_choices(ChunkChoice(), x, weight, group) == first
    assert len(plays) == len(caplog.records) == 7
    # Another shape or dtype needs another run.
    all_choices(ChunkChoice(), x[:2048], weight, group)
    all_choices(ChunkChoice(), x.bfloat16(), weight, group)
    assert len(plays) == 21


def test_routes_of_almost_the_same_size_need_no_other_run(group, plays):
    x = torch.empty(4096, 128)
    assert len({ChunkChoice().for_exchange(x, rows, 1 << 20, group) for rows in (3000, 3001, 4096)}) == 1
    assert len(plays) == 1


def test_what_needs_no_choice(group, plays):
    x, weight = torch.empty(4096, 1, 128), torch.empty(256, 128)
    assert all_choices(ChunkChoice(3), x, weight, group) == [3] * 8
    assert all_choices(ChunkChoice(3), x, weight, None) == [1] * 8
    assert all_choices(ChunkChoice(), x[:, :0], weight, group) == [1] * 8
    assert plays == []


def test_one_warning_where_no_chunk_can_be_cut(group):
    x, weight = torch.ones(2, 8, 6), torch.ones(4, 6)
    with pytest.warns(
        RuntimeWarning, match="overlap has no effect with sequence_dim=1 and more than one sample"
    ) as found:
        for _ in range(2):
            gather_product(x, weight, None, 1, group, 2)
            start_product_reduce_scatter(x, weight, None, 1, group, 2).wait()
        gather_product(x[:1], weight, None, 1, group, 2)
        gather_product(x, weight, None, 0, group, 2)
        gather_product(x, weight, None, 1, group, 1)
    assert len(found) == 1


def test_a_later_call_is_a_look_up(group, monkeypatch):
    """Compare a later call with the first one; both run in one thread, so that other work does not count."""
    costs = OverlapCosts(1e12, 1e-6, 1e9, 0.0, 0.1)
    monkeypatch.setattr(ChunkChoice, "measured", lambda self, group, like: costs)
    x, weight = torch.empty(4096, 1, 128), torch.empty(256, 128)

    def fastest(before):
        times = []
        for _ in range(50):
            before()
            begin = time.thread_time()
            ChunkChoice().for_reduction(x, weight, 0, group)
            times.append(time.thread_time() - begin)
        return min(times)

    assert fastest(_chosen.cache_clear) > 4 * fastest(lambda: None)
