"""Start here when the record of which part of a parameter a rank holds is wrong."""

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.tensor_parallel import ParameterShard, mark_shard, parameter_shard


def test_unmarked_is_replicated():
    shard = parameter_shard(torch.nn.Parameter(torch.zeros(3, 4)))
    assert shard == ParameterShard((3, 4), (0, 0), replicated=True)
    assert shard.box((3, 4)) == ((0, 3), (0, 4)) and shard.real_shape((3, 4)) == (3, 4)


def test_marked():
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    mark_shard(parameter, ParameterShard((6, 4), (3, 0)))
    assert parameter_shard(parameter) == ParameterShard((6, 4), (3, 0), replicated=False)
    with pytest.raises(InputError, match="must have the 2 dims"):
        mark_shard(parameter, ParameterShard((6,), (3,)))


@pytest.mark.parametrize(
    ("offset", "real", "box"),
    [(0, 4, (0, 4)), (4, 4, (4, 8)), (8, 1, (8, 9)), (12, 0, (9, 9))],
)
def test_padding_is_clipped(offset, real, box):
    shard = ParameterShard((9, 5), (offset, 0))
    assert shard.real_shape((4, 5)) == (real, 5)
    assert shard.box((4, 5)) == (box, (0, 5))
