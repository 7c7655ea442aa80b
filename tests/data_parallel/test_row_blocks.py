"""Start here when gradients or weights land in the wrong rows after they were sent between data-parallel ranks."""

import pytest
import torch

from fused_megatron.data_parallel.row_blocks import RowBlocks
from fused_megatron.sharding import RowShards

SHAPES = [(7, 3), (4, 2), (5,), (1, 6), (), (2, 2, 2)]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
def test_blocks_hold_the_rows_of_each_rank(num_shards: int) -> None:
    tensors = [torch.randn(shape) for shape in SHAPES]
    packing = RowBlocks(SHAPES, RowShards(num_shards))
    blocks = packing.pack(tensors, packing.new_blocks(tensors[0]))
    assert blocks.shape == (num_shards, packing.block_numel)
    for index in range(num_shards):
        of_rank = RowBlocks(SHAPES, RowShards(num_shards, index))
        own = of_rank.pack_own(tensors, torch.zeros(of_rank.block_numel))
        assert torch.equal(own, blocks[index])
        targets = [torch.full(shape, torch.nan) for shape in SHAPES]
        of_rank.unpack_own(own, targets)
        for tensor, target in zip(tensors, targets, strict=True):
            rows = RowShards(num_shards, index)
            assert torch.equal(rows.own(target), rows.own(tensor))
            assert int(target.isnan().sum()) == tensor.numel() - rows.own(tensor).numel()
    targets = [torch.full(shape, torch.nan) for shape in SHAPES]
    packing.unpack(blocks, targets)
    assert all(torch.equal(tensor, target) for tensor, target in zip(tensors, targets, strict=True))


def test_padding_is_zero_and_even_shapes_have_none() -> None:
    packing = RowBlocks([(3, 3)], RowShards(2))
    blocks = packing.pack([torch.ones(3, 3)], packing.new_blocks(torch.empty(0)))
    assert packing.padded and blocks.tolist() == [[1] * 6 + [0] * 2, [1] * 3 + [0] * 5]
    assert RowBlocks([(4, 3)], RowShards(2)).padded  # up to the next aligned address
    assert not RowBlocks([(4, 4), (16,)], RowShards(2)).padded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_shards", [2, 64])
def test_own_rows_of_every_parameter_begin_at_a_multiple_of_16_bytes(num_shards: int, dtype: torch.dtype) -> None:
    packing = RowBlocks([(1600,), (320, 24), (100,), *SHAPES], RowShards(num_shards))  # a bias has 25 rows in 64 shards
    own = packing.own_rows(torch.zeros(packing.block_numel, dtype=dtype))
    assert [rows.data_ptr() % 16 for rows in own if rows.numel()] == [0] * sum(rows.numel() > 0 for rows in own)
