"""What a data-parallel rank reads of one step."""

from dataclasses import dataclass
from typing import Any

import torch

from fused_megatron.sharding import SequenceLayout


@dataclass(frozen=True)
class Batch:
    """Rows of a global batch.

    Attributes:
        inputs: [B, S] int64 tokens.
        targets: [B, S] int64, what is to be predicted at each place; -100 where nothing is.
        is_padding: [B, S] bool, True where there is no token, for models that look at later places; None: nowhere.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    is_padding: torch.Tensor | None = None

    def take(self, sequence: SequenceLayout) -> "Batch":
        """The tokens, targets and padding at the positions that a rank has."""
        padding = None if self.is_padding is None else sequence.take(self.is_padding, 1)
        return Batch(sequence.take(self.inputs, 1), sequence.take(self.targets, 1), padding)

    def microbatches(
        self, size: int, device: torch.device
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[dict[str, Any]]]:
        """Inputs, targets and keyword arguments of the model, for every `size` rows, on the device."""
        inputs, targets = (list(part.to(device).split(size)) for part in (self.inputs, self.targets))
        if self.is_padding is None:
            return inputs, targets, [{} for _ in inputs]
        return inputs, targets, [{"is_padding": part} for part in self.is_padding.to(device).split(size)]
