"""Start here when a shard has the wrong offset in the full parameter, or padding is taken for values."""

import pytest
import torch

from fused_megatron.sharding import Box, ParameterShard, ShardPart


@pytest.mark.parametrize(
    ("offset", "real", "block"),
    [
        (0, 4, Box((0, 0), (4, 5))),
        (4, 4, Box((4, 0), (4, 5))),
        (8, 1, Box((8, 0), (1, 5))),
        (12, 0, Box((9, 0), (0, 5))),
    ],
)
def test_padding_is_clipped(offset, real, block):
    shard = ParameterShard((9, 5), (offset, 0))
    assert shard.real_shape((4, 5)) == (real, 5)
    assert shard.block((4, 5)) == block and block.lies_in((9, 5))
    held = ShardPart("", slice(None), shard).held(torch.arange(20.0).view(4, 5))
    assert held.box == block and held.full_shape == (9, 5)
    assert torch.equal(held.tensor, torch.arange(5.0 * real).view(real, 5))


def test_a_part_of_a_stack():
    part = ShardPart("key", slice(2, 5), ParameterShard((6, 2), (3, 0)))
    local = torch.arange(10.0).view(5, 2)
    held = part.held(local)
    assert held.box == Box((3, 0), (3, 2)) and torch.equal(held.tensor, local[2:])
    assert part.full_name("weight") == "weight.key"
    held.tensor.zero_()  # a view
    assert not local[2:].any()


def test_what_is_full():
    assert ShardPart("", slice(None), ParameterShard((3, 2), (0, 0))).is_full((3, 2))
    assert ShardPart("", slice(None), ParameterShard((3, 2), (0, 0))).is_full((4, 2))  # with padding
    assert ShardPart("", slice(None), ParameterShard((), ())).is_full(())
    assert not ShardPart("", slice(None), ParameterShard((6, 2), (0, 0))).is_full((3, 2))
    assert ShardPart("key", slice(4, 6), ParameterShard((2, 2), (0, 0), copy=1)).is_full((6, 2))
    assert not ShardPart("query", slice(0, 4), ParameterShard((8, 2), (4, 0))).is_full((6, 2))
