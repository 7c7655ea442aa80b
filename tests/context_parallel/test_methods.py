"""Start here when a context-parallel method gets the wrong ranks, or the wrong positions."""

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.context_parallel import exchange_size, partition_for
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.sharding import SequenceLayout, SequencePartition

CAUSAL = AttentionMask(causal=True)


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "neighbours"),
    [(4, 8, 8, 2), (4, 3, 3, 1), (8, 8, 8, 4), (8, 8, 2, 2), (8, 8, 1, 4), (6, 9, 9, 3), (2, 8, 8, 1), (1, 8, 8, 1)],
)
def test_ranks_that_exchange_heads(ranks, heads, kv_heads, neighbours):
    assert exchange_size("all_to_all+ring", ranks, heads, kv_heads) == neighbours
    assert exchange_size("ring", ranks, heads, kv_heads) == exchange_size("all_gather", ranks, heads, kv_heads) == 1
    if heads % ranks == 0:
        assert exchange_size("all_to_all", ranks, heads, kv_heads) == ranks


def test_partition_of_each_method():
    heads = {"num_heads": 4, "num_kv_heads": 4}
    zigzag = tuple(SequenceLayout.zigzag(64, rank, 2).ranges for rank in range(2))
    for method in ("ring", "all_gather"):
        found = partition_for(method, CAUSAL, 2, 64, 2, **heads)
        assert found.layouts[0].ranges == zigzag[0] and found.layouts[1].ranges == ((16, 48),)
    assert partition_for("all_to_all", CAUSAL, 2, 64, 4, **heads) == SequencePartition.contiguous(64, 4)
    # Two groups of two ranks: the zig-zag of two, and half of its rows for each rank.
    found = partition_for("all_to_all+ring", CAUSAL, 2, 64, 4, **heads)
    assert [layout.ranges for layout in found.layouts] == [((0, 16),), ((48, 64),), ((16, 32),), ((32, 48),)]
    tensor_parallel = partition_for("all_to_all+ring", CAUSAL, 2, 72, 4, **heads, multiple_of=4)
    assert tensor_parallel.sizes == (20, 16, 20, 16)


def test_documents_of_the_batch_decide():
    documents = torch.tensor([0, 64, 128, 136, 192])
    mask = AttentionMask(causal=True, documents=documents)
    heads = {"num_heads": 4, "num_kv_heads": 4}
    found = partition_for("ring", mask, 3, 64, 2, **heads)
    work = torch.arange(1, 65) * 2 + torch.cat([torch.arange(1, 9), torch.arange(1, 57)])
    loads = [int(work[layout.positions()].sum()) for layout in found.layouts]
    assert abs(loads[0] - loads[1]) <= work.max()  # one position more or less
    padded = AttentionMask(True, None, torch.zeros(3, 64, dtype=torch.bool), documents)
    assert partition_for("ring", padded, 3, 64, 2, **heads) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ring", CAUSAL, 2, 3, 4), "leaves a rank without tokens"),
        (("all_to_all+ring", CAUSAL, 2, 3, 4), "seq_len=3 on 4 context-parallel ranks leaves a rank without tokens"),
        (("all_to_all", CAUSAL, 2, 96, 3), "num_heads=4 .* context_parallel_size=3 .use 'ring', 'all_gather' or"),
        (("zigzag", CAUSAL, 2, 96, 3), "context_parallel_method='zigzag' must be one of"),
    ],
)
def test_partitions_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        partition_for(*arguments, num_heads=4, num_kv_heads=4)
