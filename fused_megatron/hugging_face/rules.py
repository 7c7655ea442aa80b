"""Rules that convert Hugging Face tensors to our tensors and back, bit for bit.

In this file, a source is a Hugging Face tensor; "our tensor" is the full tensor of a parameter of our model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fused_megatron.config import TransformerConfig
from fused_megatron.untrusted_files import BLOCK_BYTES

if TYPE_CHECKING:  # reading a config.json starts without torch
    import torch

    from fused_megatron.weight_files import StoredWeight


@dataclass(frozen=True)
class Rule:
    """The sources of one of our tensors.

    Attributes:
        name: name of our tensor, as parameter_parts names it.
        sources: names of the sources; our tensor stacks them along dim 0.
        transposed: the sources are [in, out]; ours is [out, in].
        heads: 0, or the number of heads of a fused query, key and value: the sources have all queries, then all keys,
            then all values; our tensor has query, key and value of head 0, then of head 1, ...
    """

    name: str
    sources: tuple[str, ...]
    transposed: bool = False
    heads: int = 0

    def with_names(self, names: Mapping[str, str]) -> Rule:
        """Return this rule with other names for some sources."""
        return replace(self, sources=tuple(names.get(source, source) for source in self.sources))

    def source_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of each source for the shape of our tensor."""
        first, *rest = shape
        stacked = (first // len(self.sources), *rest)
        return stacked[::-1] if self.transposed else stacked

    def full_shape(self, source_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of our tensor for the shape of each source."""
        first, *rest = source_shape[::-1] if self.transposed else source_shape
        return (first * len(self.sources), *rest)

    def fill(self, ours: torch.Tensor, offset: Sequence[int], stored: Mapping[str, StoredWeight]) -> None:
        """Fill `ours` with the block of our full tensor that begins at `offset`.

        Args:
            ours: block to fill; its shape is the shape of the block.
            offset: first index of the block in each dim.
            stored: the sources by name.

        Memory: a block of a few MB for any size of tensor.
        """
        weight = stored[self.sources[0]]
        total = self.full_shape(weight.shape)[0]
        runs = list(self._runs(offset[0], offset[0] + ours.shape[0], total))
        rows_at_once = max(1, BLOCK_BYTES // max(1, math.prod(weight.shape[1:]) * weight.dtype.itemsize))
        if self.transposed and ours.dim() == 2:
            for column in range(0, ours.shape[1], rows_at_once):
                end = min(column + rows_at_once, ours.shape[1])
                block = weight[slice(offset[1] + column, offset[1] + end),]
                for _, first, at, count in runs:
                    ours[at : at + count, column:end] = block[:, first : first + count].t()
            return
        columns = tuple(slice(begin, begin + size) for begin, size in zip(offset[1:], ours.shape[1:], strict=True))
        for source, first, at, count in runs:
            for row in range(0, count, rows_at_once):
                end = min(row + rows_at_once, count)
                where = (slice(first + row, first + end), *columns)
                ours[at + row : at + end] = stored[source][where]

    def _runs(self, start: int, stop: int, total: int) -> Iterator[tuple[str, int, int, int]]:
        """Yield, for rows start to stop of our `total` rows, runs that are contiguous in a source.

        Each is (source, first row in the source, first row after start, number of rows).
        """
        if not self.heads:
            yield self.sources[0], start, 0, stop - start
            return
        rows, parts = total // (3 * self.heads), 3 // len(self.sources)
        row = start
        while row < stop:
            head, part, inside = row // (3 * rows), row // rows % 3, row % rows
            count = min(rows - inside, stop - row)
            source, part = divmod(part, parts)
            yield self.sources[source], (part * self.heads + head) * rows + inside, row - start, count
            row += count

    def to_source(self, tensor: torch.Tensor, source: str) -> torch.Tensor:
        """Convert our tensor to one of its sources; a view if possible."""
        if self.heads:
            rows = tensor.shape[0] // (3 * self.heads)
            parts = 3 // len(self.sources)
            first = self.sources.index(source) * parts
            by_part = tensor.unflatten(0, (self.heads, 3, rows))[:, first : first + parts].transpose(0, 1)
            tensor = by_part.reshape(math.prod(by_part.shape[:3]), *by_part.shape[3:])
        return tensor.t() if self.transposed and tensor.dim() == 2 else tensor


def linear(name: str, source: str, bias: bool, *, transposed: bool = False, heads: int = 0) -> list[Rule]:
    """Return the rules of a linear's or norm's weight, and of its bias if it has one."""
    both = ("weight", "bias") if bias else ("weight",)
    return [Rule(f"{name}.{kind}", (f"{source}.{kind}",), transposed, heads) for kind in both]


def query_key_value(name: str, sources: Sequence[str], bias: bool, *, num_heads: int, grouped: bool) -> list[Rule]:
    """Return the rules of query, key and value: three tensors of ours if `grouped`, else one fused head by head."""
    rules = []
    for kind in ("weight", "bias") if bias else ("weight",):
        names = tuple(f"{source}.{kind}" for source in sources)
        if grouped:
            parts = zip(("query", "key", "value"), names, strict=True)
            rules += [Rule(f"{name}.{kind}.{part}", (source,)) for part, source in parts]
        else:
            rules.append(Rule(f"{name}.{kind}", names, heads=num_heads))
    return rules


def tied_or_own_head(config: TransformerConfig) -> list[Rule]:
    """Return the rule of the head's weight; none if the head is tied to the embedding."""
    return [] if config.tied_embeddings else [Rule("head.weight", ("lm_head.weight",))]
