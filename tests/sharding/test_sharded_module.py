"""Start here when a module's parameters lose their marks, or a model does not know its group or its parts."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.sharding import ParameterShard, ShardedModule, parallel_group, parameter_shard
from fused_megatron.sharding.sharded_module import parts_of_parameters

SHARD = ParameterShard((6, 4), (3, 0))


class Half(ShardedModule):
    def __init__(self, tp_group=None):
        super().__init__()
        self.tp_group = tp_group
        self.register_shard("weight", nn.Parameter(torch.zeros(3, 4)), SHARD)


def test_marks_outlive_new_parameters():
    half = Half()
    for module in (half, copy.deepcopy(half), half.to(torch.float64), half.to_empty(device="meta")):
        assert parameter_shard(module.weight) == SHARD
    with pytest.raises(InputError, match="cannot be pickled"):
        pickle.dumps(half)


def test_parts_are_known_where_the_record_is_lost():
    model = nn.Sequential(nn.Linear(2, 2), Half())
    model[1].weight = nn.Parameter(torch.zeros(3, 4))  # as FSDP2 does
    assert parameter_shard(model[1].weight).replicated
    parts = {name: parts_of_parameters(model)[p] for name, p in model.named_parameters()}
    assert parts["1.weight"][0].shard == SHARD
    assert parts["0.weight"][0].shard == ParameterShard((2, 2), (0, 0), replicated=True)


def test_the_group_is_that_of_the_first_layer_with_one():
    group = object()
    assert parallel_group(nn.Linear(2, 2)) is None
    assert parallel_group(nn.Sequential(Half(), Half(group), Half())) is group
