"""Start here when a module's parameters lose their shards, or the group or parts of a model are not found."""

import copy
import pickle
import warnings

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


def fresh():
    return nn.Parameter(torch.ones(3, 4))


def assigned_in_the_dictionary(half):
    half._parameters["weight"] = fresh()  # as FSDP2 does, and Accelerate


# Each of these replaces the tensor of the weight.
LOSSES = {
    "attribute": lambda half: setattr(half, "weight", fresh()),
    "assign": lambda half: half.load_state_dict({"weight": torch.ones(3, 4)}, assign=True),
    "swap_tensors": lambda half: torch.utils.swap_tensors(half.weight, fresh()),
    "dictionary": assigned_in_the_dictionary,
    "meta, then assign": lambda half: half.to("meta").load_state_dict({"weight": torch.ones(3, 4)}, assign=True),
}


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_the_module_decides_which_shard_a_tensor_is(lose):
    model = nn.Sequential(nn.Linear(2, 2), Half())
    lose(model[1])
    assert model[1].weight.sum() == 12
    parts = {name: parts_of_parameters(model)[p] for name, p in model.named_parameters()}
    assert parts["1.weight"][0].shard == SHARD
    assert parts["0.weight"][0].shard == ParameterShard((2, 2), (0, 0), replicated=True)
    assert parameter_shard(model[1].weight) == SHARD  # it is marked again


@pytest.mark.parametrize("lose", ["attribute", "assign"])
def test_what_takes_the_place_of_a_shard_is_marked_at_once(lose):
    half = Half()
    LOSSES[lose](half)
    assert parameter_shard(half.weight) == SHARD


def test_another_shape_or_other_parameters_are_refused():
    half = Half()
    with pytest.raises(
        InputError, match=r"Half.weight: shape \(6, 4\) must be \(3, 4\), the shape of this rank's shard"
    ):
        half.weight = nn.Parameter(torch.zeros(6, 4))
    half.weight.data = torch.zeros(6, 4)
    with pytest.raises(InputError, match=r"Half.weight: shape \(6, 4\) must be \(3, 4\)"):
        parts_of_parameters(half)
    half = Half()
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm):
        with warnings.catch_warnings(), pytest.raises(InputError, match="is a shard, which cannot be made of other"):
            warnings.simplefilter("ignore")  # the last is deprecated
            norm(half)
    with pytest.raises(InputError, match="weight_norm"):  # it took the weight before it could be refused
        parts_of_parameters(half)
    half = Half()
    half.weight = None
    assert parts_of_parameters(half) == {}


def test_the_group_is_that_of_the_first_layer_with_one():
    group = object()
    assert parallel_group(nn.Linear(2, 2)) is None
    assert parallel_group(nn.Sequential(Half(), Half(group), Half())) is group
