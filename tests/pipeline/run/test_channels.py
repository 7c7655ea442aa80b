"""Start here when a receive waits for its sender although it was only posted."""

import threading
from datetime import timedelta

import torch
import torch.distributed as dist

from fused_megatron.pipeline.run.channels import make_group


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
