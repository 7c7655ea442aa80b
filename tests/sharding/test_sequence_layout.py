"""Start here when a rank embeds, rotates or drops at positions that it does not hold."""

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.sharding import SequenceLayout


def test_ranks_have_every_position_once_and_tensor_parallel_blocks_of_theirs():
    ranks = [SequenceLayout.zigzag(24, rank, 3) for rank in range(3)]
    assert ranks[1].ranges == ((4, 8), (16, 20))
    assert sorted(torch.cat([rank.positions() for rank in ranks]).tolist()) == list(range(24))
    blocks = [ranks[1].block(index, 4) for index in range(4)]
    assert [block.ranges for block in blocks] == [((4, 6),), ((6, 8),), ((16, 18),), ((18, 20),)]
    assert ranks[2].block(0, 1) == ranks[2] and SequenceLayout.whole(8).block(1, 2).ranges == ((4, 8),)
    assert SequenceLayout(9, ((6, 9), (0, 3))).block(0, 2).positions().tolist() == [6, 7, 8]
    assert SequenceLayout(9, ((6, 8), (0, 4))).block(1, 2).positions().tolist() == [1, 2, 3]
    assert SequenceLayout(9, ((6, 8), (0, 4))).block(0, 2).positions().tolist() == [6, 7, 0]


def test_taking_rows_is_indexing_by_positions_and_of_one_range_a_view():
    x = torch.randn(2, 24, 3)
    for layout in (SequenceLayout.zigzag(24, 0, 2), SequenceLayout(24, ((20, 24), (3, 5))), SequenceLayout.whole(24)):
        assert torch.equal(layout.take(x, 1), x[:, layout.positions()])
        assert layout.num_positions == layout.take(x, 1).shape[1]
        assert all(x[0, start].equal(layout.take(x, 1)[0, rows][0]) for rows, start in layout.runs)
    assert SequenceLayout(24, ((2, 9),)).take(x, 1).data_ptr() == x[:, 2:].data_ptr()


@pytest.mark.parametrize(("make", "message"), [
    (lambda: SequenceLayout(8, ((0, 5), (4, 8))), r"must lie in \[0, seq_len=8\) and not overlap"),
    (lambda: SequenceLayout(8, ((6, 9),)), r"must lie in \[0, seq_len=8\)"),
    (lambda: SequenceLayout.zigzag(10, 0, 2), "seq_len=10 must be divisible by 2 x num_ranks=4"),
    (lambda: SequenceLayout.whole(7).block(0, 2), "sequence length=7 must be divisible by tensor_parallel_size=2"),
])  # fmt: skip
def test_layouts_that_cannot_be(make, message):
    with pytest.raises(InputError, match=message):
        make()
