"""Start here when a parameter's record names the wrong shard, or has lost an entry."""

import copy

import pytest
import torch
from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.sharding import (
    DeferredWeightGradients,
    ParameterRecord,
    ParameterShard,
    ShardPart,
    mark_shard,
    parameter_parts,
    parameter_record,
    parameter_shard,
    update_record,
)


def test_a_record_is_empty_until_something_is_written():
    parameter = nn.Parameter(torch.zeros(3, 4))
    assert parameter_record(parameter) == ParameterRecord(None, None, None, None)
    main_grad, deferred = lambda: torch.zeros(3, 4), DeferredWeightGradients()
    update_record(parameter, main_grad=main_grad)
    update_record(parameter, deferred=deferred)
    mark_shard(parameter, ParameterShard((6, 4), (3, 0)))
    record = parameter_record(parameter)
    assert record.shard == ParameterShard((6, 4), (3, 0))
    assert record.main_grad is main_grad and record.deferred is deferred
    assert parameter_record(nn.Parameter(torch.zeros(3, 4))) == ParameterRecord()  # each has its own
    assert parameter_record(copy.deepcopy(parameter)) == ParameterRecord()
    with pytest.raises(TypeError, match="main_gard"):
        update_record(parameter, main_gard=main_grad)


def test_unmarked_is_replicated():
    parameter = nn.Parameter(torch.zeros(3, 4))
    assert parameter_shard(parameter) == ParameterShard((3, 4), (0, 0), replicated=True)


def test_marked():
    parameter = nn.Parameter(torch.zeros(3, 4))
    mark_shard(parameter, ParameterShard((6, 4), (3, 0)))
    assert parameter_shard(parameter) == ParameterShard((6, 4), (3, 0), replicated=False)
    with pytest.raises(InputError, match="must have the 2 dims"):
        mark_shard(parameter, ParameterShard((6,), (3,)))


def test_stacked():
    parameter = nn.Parameter(torch.zeros(3, 4))
    parts = (
        ShardPart("gate", slice(0, 1), ParameterShard((2, 4), (1, 0))),
        ShardPart("up", slice(1, 3), ParameterShard((4, 4), (2, 0))),
    )
    mark_shard(parameter, parts)
    assert parameter_parts(parameter) == parts
    with pytest.raises(InputError, match=r"stacks \['gate', 'up'\]"):
        parameter_shard(parameter)


def test_products_are_taken_only_while_collecting():
    store, products = DeferredWeightGradients(), []
    assert not store.open
    with store.collecting(products):
        assert store.open
        with pytest.raises(AssertionError, match="one backward at a time"), store.collecting([]):
            pass
    assert not store.open
