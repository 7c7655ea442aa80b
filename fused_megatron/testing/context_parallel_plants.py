"""Faults of context parallelism, as contexts that plant a fault into this process; see fault_plants.py."""

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from fused_megatron.models.stack import TransformerStack
from fused_megatron.pipeline.run.executor import PipelineExecutor
from fused_megatron.sharding import SequenceLayout
from fused_megatron.testing.fault_plants import Planted


def divided_by_own_targets() -> Planted:
    """Each rank divides its loss by the number of its own targets, and the ranks are averaged."""
    original = PipelineExecutor.step

    def step(self: PipelineExecutor, inputs: Any, targets: Any, *, loss_divisor: float, **others: Any) -> Any:
        own = sum(int((target >= 0).sum()) for target in targets)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        return original(self, inputs, targets, loss_divisor=own * ranks, **others)

    return patch.object(PipelineExecutor, "step", step)


def positions_counted_by_the_rank() -> Planted:
    """Every rank counts its positions from 0."""
    original = TransformerStack._positions_and_types

    def positions(self: TransformerStack, tokens: torch.Tensor, sequence: SequenceLayout, *others: Any) -> Any:
        return original(self, tokens, SequenceLayout.whole(sequence.num_positions), *others)

    return patch.object(TransformerStack, "_positions_and_types", positions)


def rotated_by_the_position_in_the_rank() -> Planted:
    """Every rank rotates its queries and keys as if its positions began at 0."""
    original = TransformerStack._rotary

    def rotary(self: TransformerStack, sequence: SequenceLayout, *others: Any) -> Any:
        return original(self, SequenceLayout.whole(sequence.num_positions), *others)

    return patch.object(TransformerStack, "_rotary", rotary)


def dropout_by_the_position_in_the_rank() -> Planted:
    """The rows of every rank have the dropout masks of the first positions."""
    original = TransformerStack._own

    def own(self: TransformerStack, sequence: SequenceLayout) -> SequenceLayout:
        count = original(self, sequence).num_positions
        return SequenceLayout(sequence.seq_len, ((0, count),))

    return patch.object(TransformerStack, "_own", own)
