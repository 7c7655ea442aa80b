"""Start here when the start of many ranks takes long, or runs out of sockets."""

import collections
import os

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import fused_megatron as fm
from fused_megatron.collectives.together import gather_json
from fused_megatron.testing import run_on_ranks
from fused_megatron.training.process_group import backend_of, connect_on_demand, new_group_for_saves

RANKS, RANK = 1024, 5
LAZY = "TORCH_GLOO_LAZY_INIT"


class CountingStore(dist.Store):
    """Store of this process that counts the operations of its user."""

    def __init__(self):
        super().__init__()
        self.inner, self.counts = dist.HashStore(), collections.Counter()

    def _count(name):
        def call(self, *args):
            self.counts[name] += 1
            return getattr(self.inner, name)(*args)

        return call

    set, get, add, wait, check, multi_get, multi_set, append, compare_set = map(
        _count, ("set", "get", "add", "wait", "check", "multi_get", "multi_set", "append", "compare_set")
    )


def num_sockets():
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum("socket" in os.readlink(link) for link in links if os.path.lexists(link))


@pytest.fixture
def on_demand(monkeypatch):
    monkeypatch.setenv(LAZY, "0")
    monkeypatch.delenv(LAZY)  # restored after the test
    connect_on_demand()


def test_one_rank_of_1024_starts_without_the_others(on_demand):
    """A group costs a rank one entry in the store and one socket, and needs no other rank until the ranks talk."""
    before, store = num_sockets(), CountingStore()
    # As beside NCCL; its communicator is made by torch.
    dist.init_process_group("cpu:gloo", store=store, rank=RANK, world_size=RANKS)
    try:
        mesh = fm.init_mesh(8, 4, context_parallel_size=2, expert_parallel_size=4, timeout_s=60.0)
        saves = new_group_for_saves(60.0)
        own = {id(group): group for group in (dist.group.WORLD, saves, *mesh.groups.values())}
        assert sum(store.counts.values()) <= 2 * len(own), store.counts
        assert num_sockets() - before <= 2 * len(own)
        assert len(own) < 12
    finally:
        dist.destroy_process_group()


def test_a_user_may_connect_all_ranks_at_once(monkeypatch):
    monkeypatch.setenv(LAZY, "0")
    connect_on_demand()
    assert os.environ[LAZY] == "0"


def gathered_sockets(rank, world_size):
    os.environ[LAZY] = "1"
    group = dist.new_group()
    del os.environ[LAZY]
    before = num_sockets()
    values = [gather_json([rank, "x" * rank], group) for _ in range(3)]
    return values, num_sockets() - before


def test_gathered_values_go_around_a_ring():
    """Not to all ranks: a gather opens two sockets a rank, for any number of ranks."""
    ranks = 4
    for values, sockets in run_on_ranks(gathered_sockets, ranks):
        assert values == [[[rank, "x" * rank] for rank in range(ranks)]] * 3
        assert sockets <= 2 < ranks - 1


def test_a_gpu_is_bound_to_its_process_group():
    device = torch.device("cuda", 3)
    assert backend_of(device) == {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    assert backend_of(torch.device("cpu")) == {"backend": "gloo"}


def test_groups_of_1024_gpus_are_split_from_all_ranks_at_once(monkeypatch):
    """One collective for the groups of an axis. new_group would be one of all ranks for each group: 128 for tp=8."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    try:
        mesh = fm.init_mesh(8, 4)
        dist.group.WORLD.bound_device_id = torch.device("cuda", 0)
        splits, made = [], dist.new_group

        def split_group(split_ranks):
            splits.append(split_ranks)
            (own,) = [ranks for ranks in split_ranks if RANK in ranks]
            return made(own)

        monkeypatch.setattr(dist, "split_group", split_group)
        monkeypatch.setattr(dist, "new_subgroups_by_enumeration", None)
        inner, outer = mesh.split_data_parallel(8)
        assert (inner.size, outer.size) == (8, 4)
        assert len(splits) == 2
        for groups in splits:
            assert sorted(rank for ranks in groups for rank in ranks) == list(range(RANKS))
    finally:
        dist.destroy_process_group()
