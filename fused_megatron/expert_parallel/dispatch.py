"""Ways of tokens to their experts on other ranks and of the results back: all-to-all, all-gather, or none.

A layer of experts is three autograd functions. SendTokens starts the exchange and returns a ticket, a number without a
value; ExpertFunction waits for the tokens of one part of the experts after the other, and starts the way back of their
results; CollectResults waits for them and sums. Backward runs the same way with gradients. Work between SendTokens and
ExpertFunction (a shared expert) runs under the exchange, forward and backward.

Recomputation (torch.utils.checkpoint) ends with the last function that saves a tensor. With one part of the experts the
way back starts in CollectResults, which then saves none, so that a recomputed layer need not send its results again.
With several parts CollectResults saves the ticket, so that no exchange is left under way.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.collectives import Group
from fused_megatron.collectives.transfers import Transfer, start_all_gather, start_reduce_scatter
from fused_megatron.expert_parallel.expert_products import TokenExchange
from fused_megatron.expert_parallel.route_counts import RouteCounts
from fused_megatron.expert_parallel.token_order import TableOrder, counts_for, fill_slots
from fused_megatron.ops.autograd_function import AutogradFunction
from fused_megatron.ops.expert_permutation import ExpertOrder, order_by_expert


class SendTokens(AutogradFunction):
    """Start of an exchange: apply(x, probabilities, exchange) -> ticket."""

    op = "expert_parallel.ExpertMLP"

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, probabilities: torch.Tensor, exchange: "RankExchange") -> torch.Tensor:
        ctx.exchange = exchange
        exchange.start(x, probabilities)
        return x.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ticket: torch.Tensor) -> Any:
        dx, dprobabilities = ctx.exchange.finish_back()
        needs_x, needs_probabilities, _ = ctx.needs_input_grad
        return dx if needs_x else None, dprobabilities if needs_probabilities else None, None


class CollectResults(AutogradFunction):
    """End of an exchange: apply(ticket, exchange) -> y [T, H]."""

    op = "expert_parallel.ExpertMLP"

    @staticmethod
    def forward(ctx: Any, ticket: torch.Tensor, exchange: "RankExchange") -> torch.Tensor:
        ctx.exchange = exchange
        if exchange.num_parts > 1:
            ctx.save_for_backward(ticket)
        return exchange.finish()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        ctx.exchange.start_back(dy.contiguous())
        return dy.new_zeros(()), None


class RankExchange(TokenExchange):
    """Exchange of tokens between ranks, in one forward and its backward."""

    def start(self, x: torch.Tensor, probabilities: torch.Tensor) -> None:
        """Start to send tokens x [T, H] and the probabilities [T, K] of their experts."""
        raise NotImplementedError

    def finish(self) -> torch.Tensor:
        """Wait for the results, and return their sums y [T, H]."""
        raise NotImplementedError

    def start_back(self, dy: torch.Tensor) -> None:
        """Start to send the gradient of y."""
        raise NotImplementedError

    def finish_back(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Wait for the gradients of x and of the probabilities."""
        raise NotImplementedError


class LocalTokens(TokenExchange):
    """No exchange: this rank has all experts, and the table is x itself.

    Args:
        order: the order of x.
    """

    num_parts = 1

    def __init__(self, order: TableOrder) -> None:
        self._order = order
        self._results: list[torch.Tensor] = []

    def arrive(self, part: int, x: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the arguments."""
        assert weights is not None
        return x, weights

    def order(self, part: int) -> TableOrder:
        """Return the order of x."""
        return self._order

    def leave(self, part: int, y: torch.Tensor) -> None:
        """Keep the results."""
        self._results = [y]

    def result(self, x: torch.Tensor) -> torch.Tensor:
        """Return the results."""
        return self._results.pop()

    def arrive_back(self, part: int, dy: torch.Tensor) -> torch.Tensor:
        """Return the argument."""
        return dy

    def leave_back(self, part: int, dx: torch.Tensor, dweights: torch.Tensor) -> None:
        """Keep the gradients."""
        self._results = [dx, dweights]

    def gradients(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of x and of the weights."""
        dx, dweights = self._results
        self._results = []
        return dx, dweights


class GatheredTokens(RankExchange):
    """All-gather of all tokens to all ranks, and reduce-scatter of the sums over each rank's experts.

    The table has the tokens of all ranks, padded to the longest rank. The parts of the sums over the experts of all
    ranks, and over the shards of each expert, are summed in rank order.

    Args:
        experts: [T, K] int64, negative for dropped pairs.
        counts: of all ranks.
        ep_group, etp_group: the ranks.
        slots: as in ExpertMLP.forward.

    Communication: see config.parallel.cheapest_dispatch; besides, 8 K bytes a token for the routes.
    """

    num_parts = 1

    def __init__(
        self, experts: torch.Tensor, counts: RouteCounts, ep_group: Group, etp_group: Group, slots: int | None
    ) -> None:
        self._experts, self._counts, self._slots = experts, counts, slots
        self._groups = ep_group, etp_group
        self._num_tokens, self._padded = experts.shape[0], int(counts.tokens.max())
        self._order: TableOrder | None = None
        self._pending: list[Transfer] = []
        self._results: list[torch.Tensor] = []

    def start(self, x: torch.Tensor, probabilities: torch.Tensor) -> None:
        """Start to gather x and its routes over ep_group."""
        experts = torch.nn.functional.pad(self._experts, (0, 0, 0, self._padded - self._num_tokens), value=-1)
        routes = torch.cat([experts.to(torch.int32), self._pad(probabilities).view(torch.int32)], dim=1)
        self._pending = [start_all_gather(rows, 0, self._groups[0]) for rows in (routes, self._pad(x))]

    def arrive(self, part: int, x: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens and probabilities of all ranks."""
        routes, table = (self._gathered(transfer) for transfer in self._pending)
        self._pending = []
        num_selected = routes.shape[1] // 2
        self._order = self._order_of(routes[:, :num_selected].to(torch.int64))
        return table, routes[:, num_selected:].contiguous().view(torch.float32)

    def _order_of(self, experts: torch.Tensor) -> TableOrder:
        """Return the order of the table, for the experts [n, K] of its rows."""
        counts, num_local = self._counts, self._counts.num_local
        local = experts - counts.ep_rank * num_local
        local = torch.where((local >= 0) & (local < num_local) & (experts >= 0), local, -1)
        num_rows = int(counts.local.sum())
        rows_of_experts = counts_for(counts.local.sum((0, 1)).tolist(), experts.device)
        if self._slots is None:
            pairs = order_by_expert(local, num_local)
            pairs = ExpertOrder(pairs.rows[:num_rows], *pairs[1:])
            return TableOrder(0, num_local, rows_of_experts, num_rows, pairs)
        # Each expert has slots for the pairs of every rank.
        ranks = counts.ep * counts.etp
        source = torch.arange(ranks, device=experts.device).repeat_interleave(self._padded)
        keys = torch.where(local >= 0, local * ranks + source[:, None], -1)
        pairs, filled = fill_slots(keys, order_by_expert(keys, num_local * ranks), self._slots)
        return TableOrder(0, num_local, rows_of_experts, num_rows, pairs, filled)

    def order(self, part: int) -> TableOrder:
        """Return the order of the gathered tokens."""
        assert self._order is not None
        return self._order

    def leave(self, part: int, y: torch.Tensor) -> None:
        """Keep the results for finish."""
        self._results = [y]

    def result(self, x: torch.Tensor) -> torch.Tensor:
        """Return a ticket."""
        return x.new_zeros(())

    def finish(self) -> torch.Tensor:
        """Sum the results over the ranks, and return the sums of this rank's tokens."""
        return self._start_sum(self._results.pop()).wait()[: self._num_tokens]

    def start_back(self, dy: torch.Tensor) -> None:
        """Start to gather the gradient of y over ep_group."""
        self._pending = [start_all_gather(self._pad(dy), 0, self._groups[0])]

    def arrive_back(self, part: int, dy: torch.Tensor) -> torch.Tensor:
        """Return the gradients of all ranks."""
        return self._gathered(self._pending.pop())

    def leave_back(self, part: int, dx: torch.Tensor, dweights: torch.Tensor) -> None:
        """Start to sum the gradients over the ranks."""
        self._pending = [self._start_sum(dx), self._start_sum(dweights)]

    def gradients(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the gradient of a ticket."""
        return x.new_zeros(()), None

    def finish_back(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of this rank's tokens and probabilities."""
        dx, dweights = (transfer.wait()[: self._num_tokens] for transfer in self._pending)
        self._pending = []
        return dx, dweights

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        missing = self._padded - self._num_tokens
        return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()

    def _gathered(self, transfer: Transfer) -> torch.Tensor:
        return start_all_gather(transfer.wait(), 0, self._groups[1]).wait()

    def _start_sum(self, x: torch.Tensor) -> Transfer:
        of_shards = start_reduce_scatter(x, 0, self._groups[1]).wait()
        return start_reduce_scatter(of_shards, 0, self._groups[0])
