"""Routes of tokens to experts as inputs of tests and benchmarks: balanced ones, and the worst that a router can draw.

Figures of balanced routes only say little: with learned routes some experts and some ranks have several times the mean.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fused_megatron.checks import check, check_divisible, check_one_of
from fused_megatron.testing.recorded_routes import NUM_EXPERTS, recorded_routes

ROUTINGS = ("balanced", "random", "one_expert", "one_rank", "empty_rank", "rotating", "bursts", "recorded")
"""
balanced     every expert gets the same number of tokens of every rank
random       K different experts, each with the same chance
one_expert   every token chooses one expert, and K - 1 random ones
one_rank     all tokens choose experts of the last rank
empty_rank   no token chooses an expert of the first rank
rotating     the tokens of a rank choose experts of another rank, the next one in every step
bursts       neighbouring tokens choose the same experts, as the tokens of one document do
recorded     the experts of a trained router with 8 experts (recorded_routes.py); for more experts, an eighth of them
             stands for each
"""


class DrawnRoutes(NamedTuple):
    """Routes of the tokens of one rank.

    Attributes:
        experts: [T, K] int64, different experts for each token.
        probabilities: [T, K] float32, positive, with sum 1.
    """

    experts: torch.Tensor
    probabilities: torch.Tensor


def draw_routes(
    routing: str,
    num_tokens: int,
    num_experts: int,
    num_selected: int,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    step: int = 0,
    seed: int = 0,
) -> DrawnRoutes:
    """Draw the routes of one rank.

    Args:
        routing: one of ROUTINGS.
        num_tokens: T of this rank.
        num_experts: E over all ranks.
        num_selected: K; at most E. A rank or a burst with fewer than K experts fills up with the experts after its own.
        rank, num_ranks: index of this rank, and the ranks that share the experts.
        step: number of the step; other tokens are drawn.
        seed: decides all draws, together with routing, rank and step.
    """
    check_one_of("routing", routing, ROUTINGS)
    check(num_selected <= num_experts, f"num_selected={num_selected} must be at most num_experts={num_experts}")
    check_divisible("num_experts", num_experts, "num_ranks", num_ranks)
    generator = torch.Generator().manual_seed(((seed * 1009 + step) * 1009 + rank) * 1009 + ROUTINGS.index(routing))
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    own = num_experts // num_ranks
    if routing == "balanced":
        pairs = torch.arange(num_tokens * num_selected).view(num_tokens, num_selected)
        order = torch.randperm(num_experts, generator=generator)
        experts = order[pairs % num_experts][torch.randperm(num_tokens, generator=generator)]
        return _with_probabilities(experts, generator)
    if routing == "one_expert":
        scores[:, num_experts // 2] += 2
    elif routing == "one_rank":
        scores = _prefer(scores, num_experts - own, own)
    elif routing == "empty_rank":
        scores = _prefer(scores, own % num_experts, max(own, num_experts - own))
    elif routing == "rotating":
        scores = _prefer(scores, (rank + 1 + step) % num_ranks * own, own)
    elif routing == "bursts":
        starts = torch.rand(num_tokens, generator=generator) < 1 / 16
        scores = scores[starts.cumsum(0).clamp_(max=max(0, num_tokens - 1))]
    elif routing == "recorded":
        routes = recorded_routes(step % 3)
        chosen = routes[(rank * num_tokens + torch.arange(num_tokens)) % len(routes)]
        groups = torch.arange(num_experts) * NUM_EXPERTS // num_experts
        scores[(groups[:, None] == chosen[:, None]).any(-1)] += 2
    return _with_probabilities(scores.topk(num_selected).indices, generator)


def ragged_tokens(num_tokens: int, num_ranks: int) -> Sequence[int]:
    """Return numbers of tokens that differ between ranks: none on the second rank, all others uneven."""
    return [0 if rank == 1 else num_tokens - 3 * rank - rank % 2 for rank in range(num_ranks)]


def _prefer(scores: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Raise the scores of `count` experts from `first` on; the others follow in their order after these."""
    num_experts = scores.shape[1]
    distance = (torch.arange(num_experts) - first) % num_experts
    return torch.where(distance < count, scores + num_experts, (num_experts - distance).float().expand_as(scores))


def _with_probabilities(experts: torch.Tensor, generator: torch.Generator) -> DrawnRoutes:
    logits = torch.randn(experts.shape, generator=generator)
    return DrawnRoutes(experts.contiguous(), logits.softmax(-1))
