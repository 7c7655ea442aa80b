"""The batch of one data-parallel rank in one step: inputs, targets, padding and documents."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from fused_megatron.data.documents import cumulative_lengths
from fused_megatron.sharding import SequenceLayout


@dataclass(frozen=True)
class Batch:
    """Rows of a global batch.

    Attributes:
        inputs: [B, S] int64 token ids.
        targets: [B, S] int64, the token id to predict at each position; -100 for no target.
        key_padding_mask: [B, S] bool, True at padding (as in torch), for models whose tokens attend to later positions;
            None: no padding.
        document_starts: [B, S] bool on the host, True at the first token of each document of the whole sequence, and in
            the first column; tokens attend only to tokens of their own document. None: each row is one document.
        positions: [B, S] int64, the position of each token, for models that must not count from the start of the row;
            None: the tokens of a row have the positions 0 to S - 1.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    key_padding_mask: torch.Tensor | None = None
    document_starts: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def take(self, sequence: SequenceLayout) -> "Batch":
        """Return inputs, targets, padding and positions at the sequence positions of one rank.

        document_starts stays whole: queries of one rank see keys of others.
        """
        padding, positions = (
            None if part is None else sequence.take(part, 1) for part in (self.key_padding_mask, self.positions)
        )
        return Batch(
            sequence.take(self.inputs, 1), sequence.take(self.targets, 1), padding, self.document_starts, positions
        )

    def split(self, size: int) -> list["Batch"]:
        """Split into batches of `size` rows; the last one may have fewer."""
        parts = {name: part.split(size) for name, part in vars(self).items() if part is not None}
        return [Batch(**dict(zip(parts, tensors, strict=True))) for tensors in zip(*parts.values(), strict=True)]

    def pinned(self) -> "Batch":
        """Return the same batch in pinned memory, from which it is sent to a GPU without a wait of the host."""
        moved = {name: part for name, part in vars(self).items() if part is not None and name != "document_starts"}
        return replace(self, **{name: _pinned(part) for name, part in moved.items()})

    def microbatches(
        self, size: int, device: torch.device
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[dict[str, Any]]]:
        """Split into microbatches of `size` rows on the device: (inputs, targets, keyword arguments of the model)."""
        inputs, targets = (list(_on(device, part).split(size)) for part in (self.inputs, self.targets))
        keywords: list[dict[str, Any]] = [{} for _ in inputs]
        for name in ("key_padding_mask", "positions"):
            tensor = getattr(self, name)
            if tensor is not None:
                for keyword, part in zip(keywords, _on(device, tensor).split(size), strict=True):
                    keyword[name] = part
        if self.document_starts is not None:
            for keyword, starts in zip(keywords, self.document_starts.split(size), strict=True):
                keyword["documents"] = cumulative_lengths(starts)
        return inputs, targets, keywords


def _on(device: torch.device, part: torch.Tensor) -> torch.Tensor:
    """Copy to the device. Only from pinned memory does the host not wait for the GPU to finish what it has to do."""
    return _pinned(part).to(device, non_blocking=True) if device.type != "cpu" else part.to(device)


def _pinned(part: torch.Tensor) -> torch.Tensor:
    """Return a tensor in pinned memory, dense: torch copies a view with gaps by way of memory that is not pinned."""
    return part if part.is_contiguous() and part.is_pinned() else part.contiguous().pin_memory()
