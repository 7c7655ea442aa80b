"""Start here when a layout sends more bytes than the theory says."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fused_megatron.config import GPTConfig
from fused_megatron.mesh import ParallelLayout
from fused_megatron.models import GPT
from fused_megatron.observe.record_communication import record_communication
from fused_megatron.testing import run_on_ranks

S, B, H, LAYERS, RANKS = 64, 2, 256, 2, 64  # no other collective has S B H elements


def calls_of_a_step(rank, world_size, sequence_parallel):
    """Return the calls of a step on rank 5 of a fake group."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=RANKS)
    config = GPTConfig(num_layers=LAYERS, hidden_size=H, num_heads=RANKS, seq_len=S, vocab_size=512)
    model = GPT(config, layout=ParallelLayout(dist.group.WORLD, sequence_parallel))
    tokens = torch.zeros(B, S, dtype=torch.int64)
    with record_communication() as ledger:
        model(tokens, tokens).sum().backward()
    return [(e.kind, e.elements, e.num_bytes, e.backward, len(e.group)) for e in ledger.entries]


def calls(sequence_parallel):
    """Return the number of collectives of S B H elements by (kind, backward), and the bytes of the loss's gather."""
    (entries,) = run_on_ranks(calls_of_a_step, 1, sequence_parallel)
    assert {entry[-1] for entry in entries} == {RANKS}
    counts = {}
    for kind, elements, _, backward, _ in entries:
        if elements == S * B * H:
            counts[kind, backward] = counts.get((kind, backward), 0) + 1
    small = [
        (kind, num_bytes) for kind, elements, num_bytes, backward, _ in entries if elements < S * B * H and not backward
    ]
    return counts, small


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_collectives_of_a_step(sequence_parallel):
    counts, others = calls(sequence_parallel)
    if sequence_parallel:
        # Forward: 2 gathers and 2 scatters per block, 1 scatter for the embedding, 1 gather for the head. Backward:
        # the duals, and a gather for each gathered input that was not kept.
        assert counts == {
            ("all_gather", False): 2 * LAYERS + 1,
            ("reduce_scatter", False): 2 * LAYERS + 1,
            ("all_gather", True): (2 * LAYERS + 1) + (2 * LAYERS + 1),
            ("reduce_scatter", True): 2 * LAYERS + 1,
        }
    else:
        assert counts == {("all_reduce", False): 2 * LAYERS + 1, ("all_reduce", True): 2 * LAYERS + 1}
    # The loss: one gather of 12 bytes per token from every rank, and nothing else.
    assert others == [("all_gather", 12 * S * B * RANKS)]
