"""Small modules of tensor-parallel layers, as a user would write them, with a batch for each."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fused_megatron.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel_linear,
    vocab_parallel_cross_entropy,
)

VOCAB_SIZE, WIDTH = 29, 16
ROWS = {"x": torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0))}
"""A batch for perceptron()."""
TOKENS = {
    "ids": torch.arange(3 * 7).view(3, 7) * 5 % VOCAB_SIZE,
    "target": torch.arange(3 * 7).view(3, 7) * 3 % VOCAB_SIZE,
}
"""A batch for smoothed_loss()."""


class Perceptron(nn.Module):
    """A column-parallel and a row-parallel layer; the loss is the mean of the squared outputs."""

    def __init__(self, tp_group: Any) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(WIDTH, 2 * WIDTH, tp_group=tp_group, init_std=0.3)
        self.down = RowParallelLinear(2 * WIDTH, WIDTH, tp_group=tp_group, init_std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scalar loss of x [B, WIDTH]."""
        loss: torch.Tensor = self.down(F.gelu(self.up(x))).square().mean()
        return loss


class SmoothedLoss(nn.Module):
    """An embedding that is tied to the head, and a loss with label smoothing."""

    def __init__(self, tp_group: Any) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.words = VocabParallelEmbedding(VOCAB_SIZE, WIDTH, tp_group=tp_group, pad_to_multiple_of=4, init_std=0.5)

    def forward(self, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the scalar loss of ids and target [B, S]."""
        logits = column_parallel_linear(torch.tanh(self.words(ids)), self.words.weight, tp_group=self.tp_group)
        return vocab_parallel_cross_entropy(
            logits, target, tp_group=self.tp_group, vocab_size=VOCAB_SIZE, label_smoothing=0.3
        ).mean()


def perceptron(mesh: Any) -> Perceptron:
    """Build the module for a mesh, or for one process if mesh is None."""
    return Perceptron(None if mesh is None else mesh.tp_group)


def smoothed_loss(mesh: Any) -> SmoothedLoss:
    """Build the module for a mesh, or for one process if mesh is None."""
    return SmoothedLoss(None if mesh is None else mesh.tp_group)
