"""Drawing of tokens from logits: temperature, top-k, top-p."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fused_megatron.checks import check


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Each sequence has random numbers of its own, so that its text does not depend on the others in the batch.

    Attributes:
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: draw from the k most likely tokens only; 0 for all tokens.
        top_p: draw from the fewest tokens only whose probabilities, after temperature and top_k, sum to at least
            top_p; 1 for all tokens.
        seed: of the first sequence; the next sequences have seed + 1, seed + 2, ..

    Paper: Holtzman et al. 2020 (top-p, arXiv:1904.09751).
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.temperature >= 0, f"temperature={self.temperature} must be 0 or more")
        check(self.top_k >= 0, f"top_k={self.top_k} must be 0 or more (0: all tokens)")
        check(0 < self.top_p <= 1, f"top_p={self.top_p} must be above 0 and at most 1 (1: all tokens)")

    def generators(self, batch: int) -> list[torch.Generator]:
        """Return a source of random numbers for each sequence."""
        return [torch.Generator().manual_seed(self.seed + row) for row in range(batch)]


def draw(logits: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """Draw a token from each row of logits [B, V] float32, on the CPU."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    logits = logits / sampling.temperature
    ids = None
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, ids = logits.topk(sampling.top_k, dim=-1)
        # In the order of their ids: another order of near-equal logits, in another layout, changes no draw.
        ids, order = ids.sort(dim=-1)
        logits = logits.gather(-1, order)
    probabilities = logits.softmax(dim=-1)
    if sampling.top_p < 1:
        probabilities = probabilities.masked_fill(~_nucleus(probabilities, sampling.top_p), 0.0)
    drawn = [
        torch.multinomial(row, 1, generator=generator) for row, generator in zip(probabilities, generators, strict=True)
    ]
    chosen = torch.stack(drawn)
    return (chosen if ids is None else ids.gather(-1, chosen)).squeeze(-1).tolist()


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return which tokens [B, V] belong to the fewest whose probabilities sum to at least top_p."""
    descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = descending.cumsum(dim=-1) - descending
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, order, before < top_p)
