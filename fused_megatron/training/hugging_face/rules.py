"""Which of transformers' tensors make a tensor of ours, and back: bit for bit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fused_megatron.config import GPTConfig


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

    def source_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each of theirs, given that of ours."""
        first, *rest = shape
        stacked = (first // len(self.sources), *rest)
        return stacked[::-1] if self.transposed else stacked

    def to_ours(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Ours from theirs; a view where it can be."""
        turned = [t.t() if self.transposed and t.dim() == 2 else t for t in tensors]
        if not self.heads:
            (only,) = turned
            return only
        parts = 3 // len(turned)  # of one source
        rows = turned[0].shape[0] // (parts * self.heads)
        ours = turned[0].new_empty((self.heads, 3, rows, *turned[0].shape[1:]))
        for i, tensor in enumerate(turned):
            ours[:, i * parts : (i + 1) * parts] = tensor.unflatten(0, (parts, self.heads, rows)).transpose(0, 1)
        return ours.flatten(0, 2)

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


def tied_or_own_head(config: GPTConfig) -> list[Rule]:
    """The head's tensor, where it is not the embedding's."""
    return [] if config.tied_embeddings else [Rule("head.weight", ("lm_head.weight",))]
