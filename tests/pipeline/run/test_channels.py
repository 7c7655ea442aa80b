"""Start here when a posted receive waits for its sender, or NCCL's messages take SMs from products."""

import threading
import types
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup

from fused_megatron.pipeline.run import channels
from fused_megatron.pipeline.run.channels import NCCLSettings, make_group, nccl_options, nccl_settings
from fused_megatron.pipeline.schedule.routing import Channel


def test_a_channel_goes_first_and_takes_few_sms():
    assert nccl_settings(is_channel=True) == NCCLSettings(True, 2, 4)
    # The sum of tied weights is once a step, and computation waits for it.
    assert nccl_settings(is_channel=False) == NCCLSettings(False, None, None)


class Options:
    def __init__(self, is_high_priority_stream):
        self.is_high_priority_stream = is_high_priority_stream
        self.config = types.SimpleNamespace(min_ctas="of NCCL", max_ctas="of NCCL")


def test_options_reach_nccl(monkeypatch):
    """Without a GPU torch has no NCCL: a stand-in takes the options."""
    made = []
    nccl = types.SimpleNamespace(Options=Options)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", nccl, raising=False)
    options = nccl_options(nccl_settings(is_channel=False), timedelta(seconds=7))
    assert vars(options.config) == {"min_ctas": "of NCCL", "max_ctas": "of NCCL"}
    assert (options.is_high_priority_stream, options._timeout) == (False, timedelta(seconds=7))

    class Group:
        Options = Options

        def __init__(self, store, rank, size, options):
            made.append((rank, size, options))

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Group, raising=False)
    make_group(dist.HashStore(), "a", 1, 2, torch.device("cuda", 0), timedelta(seconds=5), is_channel=True)
    ((rank, size, options),) = made
    assert (rank, size, options.is_high_priority_stream) == (1, 2, True)
    assert vars(options.config) == {"min_ctas": 2, "max_ctas": 4}
    assert options._timeout == timedelta(seconds=5)


def pair_of_ranks():
    store, groups = dist.HashStore(), {}

    def make(rank):
        groups[rank] = make_group(store, "pair", rank, 2, torch.device("cpu"), timedelta(seconds=3))

    threads = [threading.Thread(target=make, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return groups


def test_a_posted_receive_does_not_wait_for_its_sender(monkeypatch):
    """Not even where torch connects the ranks of other groups on demand: half of all pairs would wait."""
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for _ in range(6):
        groups = pair_of_ranks()
        buffer, sent = torch.zeros(3), torch.arange(3.0)
        posted = groups[0].recv([buffer], 1, 0)  # this thread sends after it
        groups[1].send([sent], 0, 0).wait()
        posted.wait()
        assert torch.equal(buffer, sent)


def test_channels_make_such_groups(monkeypatch):
    made = []

    def fake_group(*arguments, is_channel=False):
        made.append(is_channel)
        return FakeProcessGroup._create_internal(0, 2)

    monkeypatch.setattr(channels, "make_group", fake_group)
    keys = [Channel(0, 1, "forward"), Channel(1, 0, "backward"), Channel(1, 2, "forward")]
    channels.Channels(keys, 0, dist.HashStore(), torch.device("cpu"), timedelta(seconds=5)).close()
    assert made == [True, True]
