"""Numbers of rows that ranks send to the experts of each other, known to all of them after one exchange.

This exchange has the only numbers of a layer that a host reads. It also carries the errors of a rank to the others,
which would wait for its rows otherwise.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fused_megatron.checks import has_values
from fused_megatron.collectives import Group, group_rank, group_size
from fused_megatron.collectives.groups import is_fake
from fused_megatron.collectives.together import run_together
from fused_megatron.collectives.transfers import start_all_gather

ASSUMED_ROUTES = ("balanced", "worst")
"""Routes of tensors without values. worst: every token chooses as many experts of this rank as it can."""


class RouteCounts:
    """Numbers of rows and tokens of the ep x etp ranks that exchange tokens.

    Args:
        rows: [etp, ep, E] int64; the rows that each rank sends to each expert.
        tokens: [etp, ep] int64; the tokens of each rank.
        ep_rank, etp_rank: indices of this rank.
    """

    def __init__(self, rows: np.ndarray, tokens: np.ndarray, ep_rank: int, etp_rank: int) -> None:
        self.rows, self.tokens = rows, tokens
        self.ep_rank, self.etp_rank = ep_rank, etp_rank
        self.etp, self.ep, self.num_experts = rows.shape
        self.num_local = self.num_experts // self.ep

    @property
    def sent(self) -> np.ndarray:
        """[E]: rows that this rank sends to each expert."""
        found: np.ndarray = self.rows[self.etp_rank, self.ep_rank]
        return found

    @property
    def local(self) -> np.ndarray:
        """[etp, ep, E / ep]: rows that each rank sends to the experts of this rank."""
        first = self.ep_rank * self.num_local
        return self.rows[:, :, first : first + self.num_local]


def gather_counts(
    counts: torch.Tensor | None,
    num_tokens: int,
    num_experts: int,
    groups: tuple[Group, Group],
    check: Callable[[], None],
) -> RouteCounts:
    """Exchange the numbers of rows; raise on all ranks if one of them has an error.

    Args:
        counts: [E] int64, the rows that this rank sends to each expert; None if it has an error.
        num_tokens: T of this rank.
        num_experts: E.
        groups: ep_group and etp_group.
        check: raises the error of this rank, if it has one.

    Raises:
        SharedInputError: check raised an InputError on some rank.
        SharedFailure: check raised another error.

    Communication: one all-gather of 8 (E + 2) bytes over ep_group, and one of ep times as many over etp_group. The host
        waits for them once.
    """
    ep_group, etp_group = groups
    shape = (group_size(etp_group), group_size(ep_group), num_experts + 2)
    if counts is None:
        own = torch.zeros(num_experts + 2, dtype=torch.int64)
        own[-1] = 1
    else:
        own = torch.cat([counts, torch.tensor([num_tokens, 0]).to(counts.device, non_blocking=True)])
    if any(is_fake(group) for group in groups):
        every = own.expand(shape)  # every rank has the numbers of this one
    else:
        every = start_all_gather(own, 0, ep_group).wait()
        every = start_all_gather(every, 0, etp_group).wait().view(shape)
    numbers = _on_host(every)
    if numbers[..., -1].any():
        run_together(etp_group, lambda: run_together(ep_group, check))
        raise AssertionError("a rank sent an error and raised none")
    return RouteCounts(numbers[..., :-2], numbers[..., -2], group_rank(ep_group), group_rank(etp_group))


def equal_counts(rows: int, num_tokens: int, num_experts: int, groups: tuple[Group, Group]) -> RouteCounts:
    """Return the counts of ranks that all have the same number of rows for each expert; no communication."""
    ep_group, etp_group = groups
    ranks = (group_size(etp_group), group_size(ep_group))
    numbers = np.full((*ranks, num_experts), rows, dtype=np.int64)
    return RouteCounts(numbers, np.full(ranks, num_tokens), group_rank(ep_group), group_rank(etp_group))


def assumed_counts(
    routes: str, num_tokens: int, num_selected: int, num_experts: int, groups: tuple[Group, Group]
) -> RouteCounts:
    """Return counts in place of real ones, for tensors without values; every rank has the same number of tokens.

    Args:
        routes: one of ASSUMED_ROUTES.
        num_tokens: T.
        num_selected: K.
        num_experts: E.
        groups: ep_group and etp_group.
    """
    num_pairs = num_tokens * num_selected
    found = equal_counts(num_pairs // num_experts, num_tokens, num_experts, groups)
    if routes == "balanced":
        found.rows[..., : num_pairs % num_experts] += 1
        return found
    # The experts of this rank come first.
    most = [num_tokens] * num_selected + [0] * (num_experts - num_selected)
    first = found.ep_rank * found.num_local
    found.rows[...] = np.roll(most, first)
    return found


def first_error(check: Callable[[], None]) -> Exception | None:
    """Return the error that check raises on this rank, or None."""
    try:
        check()
    except Exception as error:  # of any class: the other ranks must hear of it, or they wait for ever
        return error
    return None


def _on_host(x: torch.Tensor) -> np.ndarray:
    """Read numbers on the host. A GPU is waited for; this is the only place where a layer of experts does so."""
    assert has_values(x)
    numbers: Any = x.cpu().numpy()
    found: np.ndarray = numbers
    return found
