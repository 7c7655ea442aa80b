"""Whole weights of a head in shards, for code that multiplies by a head's weight itself, as TRL's trainers do."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fused_megatron.collectives import all_gather_split
from fused_megatron.interop.layers import GatheredLinear
from fused_megatron.interop.refusals import models_inside


@dataclass
class WholeHead:
    """The weights of a head, gathered from its shards; gradients go back to the shards.

    Attributes:
        weight: [V, H].
        bias: [V], or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


class OutputEmbeddings:
    """Replacement of a parallel model's get_output_embeddings, which returns a WholeHead for a head in shards.

    The caller must compute the same on every rank: then each rank keeps its own rows of the gradient.

    Communication: one all-gather of the weight in each call; none in backward.
    Memory: the whole weight, as long as the caller keeps it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> Any:
        """Return the head, or its whole weights."""
        kind: Any = type(self.model)
        head = kind.get_output_embeddings(self.model)
        if not isinstance(head, GatheredLinear):
            return head
        weight, bias = (
            None if shard is None else all_gather_split(shard, 0, head.tp_group)[: head.out_features]
            for shard in (head.weight, head.bias)
        )
        assert weight is not None
        return WholeHead(weight, bias)


def show_whole_heads(model: nn.Module) -> None:
    """Replace get_output_embeddings in a model, and in the transformers models inside it."""
    for one in models_inside(model):
        if callable(getattr(type(one), "get_output_embeddings", None)):
            one.get_output_embeddings = OutputEmbeddings(one)  # type: ignore[assignment]
