"""The batch of one data-parallel rank in one step: inputs, targets and padding."""

from dataclasses import dataclass
from typing import Any

import torch

from fused_megatron.sharding import SequenceLayout


@dataclass(frozen=True)
class Batch:
    """Rows of a global batch.

    Attributes:
        inputs: [B, S] int64 token ids.
        targets: [B, S] int64, the token id to predict at each position; -100 for no target.
        is_padding: [B, S] bool, True at positions without a token, for models whose tokens attend to later positions;
            None: no padding.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    is_padding: torch.Tensor | None = None

    def take(self, sequence: SequenceLayout) -> "Batch":
        """Return inputs, targets and padding at the sequence positions of one rank."""
        padding = None if self.is_padding is None else sequence.take(self.is_padding, 1)
        return Batch(sequence.take(self.inputs, 1), sequence.take(self.targets, 1), padding)

    def microbatches(
        self, size: int, device: torch.device
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[dict[str, Any]]]:
        """Split into microbatches of `size` rows on the device: (inputs, targets, keyword arguments of the model)."""
        inputs, targets = (list(part.to(device).split(size)) for part in (self.inputs, self.targets))
        if self.is_padding is None:
            return inputs, targets, [{} for _ in inputs]
        return inputs, targets, [{"is_padding": part} for part in self.is_padding.to(device).split(size)]
