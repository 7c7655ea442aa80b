"""The batch of one data-parallel rank in one step: inputs, targets and padding."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from fused_megatron.sharding import SequenceLayout


@dataclass(frozen=True)
class Batch:
    """Rows of a global batch.

    Attributes:
        inputs: [B, S] int64 token ids.
        targets: [B, S] int64, the token id to predict at each position; -100 for no target.
        key_padding_mask: [B, S] bool, True at padding (as in torch), for models whose tokens attend to later positions;
            None: no padding.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    key_padding_mask: torch.Tensor | None = None

    def take(self, sequence: SequenceLayout) -> "Batch":
        """Return inputs, targets and padding at the sequence positions of one rank."""
        padding = None if self.key_padding_mask is None else sequence.take(self.key_padding_mask, 1)
        return Batch(sequence.take(self.inputs, 1), sequence.take(self.targets, 1), padding)

    def split(self, size: int) -> list["Batch"]:
        """Return the microbatches of `size` rows, as views."""
        tensors = [getattr(self, field.name) for field in fields(self)]
        count = len(self.inputs.split(size))
        parts = [[None] * count if tensor is None else tensor.split(size) for tensor in tensors]
        return [Batch(*each) for each in zip(*parts, strict=True)]

    def microbatches(
        self, size: int, device: torch.device
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[dict[str, Any]]]:
        """Split into microbatches of `size` rows on the device: (inputs, targets, keyword arguments of the model)."""
        inputs, targets = (list(_on(device, part).split(size)) for part in (self.inputs, self.targets))
        if self.key_padding_mask is None:
            return inputs, targets, [{} for _ in inputs]
        padding = _on(device, self.key_padding_mask).split(size)
        return inputs, targets, [{"key_padding_mask": part} for part in padding]


def _on(device: torch.device, part: torch.Tensor) -> torch.Tensor:
    """Copy to the device. Only from pinned memory does the host not wait for the GPU to finish what it has to do."""
    return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part.to(device)
