"""Which of transformers' tensors make a tensor of ours, and back: bit for bit."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fused_megatron.config import TransformerConfig
from fused_megatron.weight_files import BLOCK_BYTES, StoredWeight


@dataclass(frozen=True)
class Rule:
    """One full tensor of ours.

    Attributes:
        name: ours, as parameter_parts names it.
        sources: theirs; several stand one below the other.
        transposed: theirs are [in, out].
        heads: above 0, theirs are query, key and value, one below the other, and ours has them head by head.
    """

    name: str
    sources: tuple[str, ...]
    transposed: bool = False
    heads: int = 0

    def with_names(self, names: Mapping[str, str]) -> "Rule":
        """The same, with other names for some of theirs."""
        return replace(self, sources=tuple(names.get(source, source) for source in self.sources))

    def source_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each of theirs, given that of ours."""
        first, *rest = shape
        stacked = (first // len(self.sources), *rest)
        return stacked[::-1] if self.transposed else stacked

    def full_shape(self, source_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of ours, given that of each of theirs."""
        first, *rest = source_shape[::-1] if self.transposed else source_shape
        return (first * len(self.sources), *rest)

    def fill(self, ours: torch.Tensor, offset: Sequence[int], stored: Mapping[str, StoredWeight]) -> None:
        """Read what lies at offset of the full tensor, in the shape of `ours`, into it.

        Memory: a block of a few MB, however large the tensor is.
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
        """Of our rows start to stop of a total: (source, its first row, place behind start, how many) of each run."""
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

    def to_theirs(self, tensor: torch.Tensor, source: str) -> torch.Tensor:
        """One of theirs from ours; a view where it can be."""
        if self.heads:
            rows = tensor.shape[0] // (3 * self.heads)
            parts = 3 // len(self.sources)
            first = self.sources.index(source) * parts
            apart = tensor.unflatten(0, (self.heads, 3, rows))[:, first : first + parts].transpose(0, 1)
            tensor = apart.reshape(math.prod(apart.shape[:3]), *apart.shape[3:])
        return tensor.t() if self.transposed and tensor.dim() == 2 else tensor


def linear(name: str, source: str, bias: bool, *, transposed: bool = False, heads: int = 0) -> list[Rule]:
    """Weight and bias of a layer."""
    both = ("weight", "bias") if bias else ("weight",)
    return [Rule(f"{name}.{kind}", (f"{source}.{kind}",), transposed, heads) for kind in both]


def query_key_value(name: str, sources: Sequence[str], bias: bool, *, num_heads: int, grouped: bool) -> list[Rule]:
    """Ours is one tensor, head by head, or (grouped) has query, key and value as parts of their own."""
    rules = []
    for kind in ("weight", "bias") if bias else ("weight",):
        theirs = tuple(f"{source}.{kind}" for source in sources)
        if grouped:
            parts = zip(("query", "key", "value"), theirs, strict=True)
            rules += [Rule(f"{name}.{kind}.{part}", (source,)) for part, source in parts]
        else:
            rules.append(Rule(f"{name}.{kind}", theirs, heads=num_heads))
    return rules


def tied_or_own_head(config: TransformerConfig) -> list[Rule]:
    """The head's tensor, where it is not the embedding's."""
    return [] if config.tied_embeddings else [Rule("head.weight", ("lm_head.weight",))]
