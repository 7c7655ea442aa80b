"""Start here when a checkpoint names a parameter wrongly, or stores another part of it than the rank holds."""

import torch
from torch import nn

from fused_megatron.checkpoint.model_state import optimizer_boxes, parameter_boxes
from fused_megatron.sharding import Box, ParameterShard, ShardPart, mark_shard


def test_names_and_boxes():
    stacked, padding = nn.Parameter(torch.arange(10.0).view(5, 2)), nn.Parameter(torch.zeros(4, 2))
    gate = ShardPart("gate", slice(0, 2), ParameterShard((4, 2), (2, 0)))
    up = ShardPart("up", slice(2, 5), ParameterShard((6, 2), (3, 0)))
    mark_shard(stacked, (gate, up))
    mark_shard(padding, ParameterShard((3, 2), (4, 0)))  # a rank that holds nothing of a small vocabulary
    parameters = {"mlp": stacked, "embedding": padding}
    boxes = parameter_boxes(parameters)
    assert {name: (box.box, box.full_shape) for name, box in boxes.items()} == {
        "model.mlp.gate": (Box((2, 0), (2, 2)), (4, 2)),
        "model.mlp.up": (Box((3, 0), (3, 2)), (6, 2)),
        "model.embedding": (Box((3, 0), (0, 2)), (3, 2)),
    }
    assert all(box.box.lies_in(box.full_shape) for box in boxes.values())
    assert torch.equal(boxes["model.mlp.up"].tensor, stacked[2:])
    moments = {"mlp": {"exp_avg": torch.ones(5, 2)}}
    assert list(optimizer_boxes(parameters, moments)) == ["optimizer.exp_avg.mlp.gate", "optimizer.exp_avg.mlp.up"]
