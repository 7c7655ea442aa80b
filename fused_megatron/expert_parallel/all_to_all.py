"""All-to-all of tokens: each token is sent to the ranks of its experts, and their results come back."""

from itertools import pairwise

import numpy as np
import torch

from fused_megatron.collectives import Group
from fused_megatron.collectives.exchanges import start_row_exchange
from fused_megatron.collectives.transfers import Transfer
from fused_megatron.collectives.transport.host_ring import add_in_order
from fused_megatron.expert_parallel.dispatch import RankExchange
from fused_megatron.expert_parallel.route_counts import RouteCounts
from fused_megatron.expert_parallel.token_order import (
    TableOrder,
    counts_for,
    order_of_blocks,
    reorder_experts,
    weights_of_pairs,
)
from fused_megatron.ops.expert_permutation import ExpertOrder, combine_tokens

Sizes = list[list[int]]
"""Rows that each rank sends to each rank."""


class _Part:
    """Numbers of rows of a part of the experts: the local experts first .. end - 1 of every rank.

    A rank sends rows by expert. Rows for its own experts come first and are copied; they are not part of the exchange.

    Attributes:
        begin: index of the part's first row among those that this rank sends.
        num_own: rows of this rank for its own experts.
        num_sent: rows of this rank for the experts of all ranks.
        sizes: rows that the ranks of ep_group send to each other.
        num_received: rows of the ranks of ep_group for the experts of this rank, its own rows among them.
        shard_sizes: rows that the ranks of etp_group send to each other, so that each has the rows of all.
        num_rows: rows of all ranks for the experts of this rank.
        blocks: [etp x ep, experts], these rows by rank, in the order of the table.
        sequence: [etp x ep], the blocks in an order that all ranks of etp_group share: they sum the gradients of biases
            that all of them hold.
    """

    def __init__(self, counts: RouteCounts, first: int, end: int, begin: int) -> None:
        ep_rank, etp_rank = counts.ep_rank, counts.etp_rank
        self.first, self.end, self.begin = first, end, begin
        by_rank = counts.rows.reshape(counts.etp, counts.ep, counts.ep, counts.num_local)[..., first:end]
        between = by_rank.sum(-1)
        sizes = between[etp_rank].copy()
        self.num_sent, self.num_received = int(sizes[ep_rank].sum()), int(sizes[:, ep_rank].sum())
        self.num_own = int(sizes[ep_rank, ep_rank])
        np.fill_diagonal(sizes, 0)
        self.sizes: Sizes = sizes.tolist()
        self.sizes_back: Sizes = sizes.T.tolist()
        of_shards = between[:, :, ep_rank].sum(1)
        shard_sizes = np.tile(of_shards[:, None], (1, counts.etp))
        np.fill_diagonal(shard_sizes, 0)
        self.shard_sizes: Sizes = shard_sizes.tolist()
        self.shard_sizes_back: Sizes = shard_sizes.T.tolist()
        self.num_rows = int(of_shards.sum())
        shards = _own_first(counts.etp, etp_rank)
        self.sequence = np.argsort(np.repeat(shards, counts.ep), kind="stable")
        own_first = by_rank[:, :, ep_rank][shards][:, _own_first(counts.ep, ep_rank)]
        self.blocks = own_first.reshape(-1, end - first)


def _own_first(size: int, own: int) -> list[int]:
    return [own, *(index for index in range(size) if index != own)]


class SentTokens(RankExchange):
    """All-to-all of rows over ep_group; over etp_group each rank gets all rows, and parts of results are summed.

    Args:
        order: the pairs of this rank's tokens, in the order of the experts.
        filled: [N] bool, False for sorted rows that stand for no pair; None: every row is a pair.
        counts: of all ranks.
        num_parts: number of parts of the experts, at most E / ep.
        ep_group, etp_group: the ranks.

    Communication: see config.parallel.cheapest_dispatch; besides, 4 bytes a row for the probabilities.
    """

    def __init__(
        self,
        order: ExpertOrder,
        filled: torch.Tensor | None,
        counts: RouteCounts,
        num_parts: int,
        ep_group: Group,
        etp_group: Group,
    ) -> None:
        self.num_parts = num_parts
        self._ep_group, self._etp_group = ep_group, etp_group
        self._etp, self._etp_rank = counts.etp, counts.etp_rank
        edges = [part * counts.num_local // num_parts for part in range(num_parts + 1)]
        ranks = _own_first(counts.ep, counts.ep_rank)
        sequence = [
            rank * counts.num_local + expert
            for first, end in pairwise(edges)
            for rank in ranks
            for expert in range(first, end)
        ]
        self._sent = reorder_experts(order, counts.sent, np.array(sequence))
        self._filled = filled
        self._num_selected = max(1, order.places.shape[1])
        self._parts: list[_Part] = []
        begin = 0
        for first, end in pairwise(edges):
            self._parts.append(_Part(counts, first, end, begin))
            begin += self._parts[-1].num_sent
        self._num_sent = begin
        self._orders: dict[int, TableOrder] = {}
        # Transfers under way, by part: rows and weights that arrive, and rows and weights that return.
        self._arriving: list[tuple[Transfer, ...]] = []
        self._returning: list[tuple[Transfer, ...]] = []
        self._returned: tuple[torch.Tensor, ...] = ()
        self._results: list[torch.Tensor] = []

    def start(self, x: torch.Tensor, probabilities: torch.Tensor) -> None:
        """Start to send the rows of all parts."""
        weights = probabilities.reshape(-1).index_select(0, self._sent.rows)
        if self._filled is not None:
            weights = weights * self._filled
        self._arriving = [(self._send(x, part), self._send_sorted(weights[:, None], part)) for part in self._parts]

    def arrive(self, part: int, x: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of all ranks for a part, and their weights [n, 1]."""
        table, table_weights = (self._of_all_shards(transfer.wait(), part) for transfer in self._arriving[part])
        self._arriving[part] = ()
        return table, table_weights

    def order(self, part: int) -> TableOrder:
        """Return the order of the rows of a part."""
        if part not in self._orders:
            numbers = self._parts[part]
            pairs = order_of_blocks(numbers.blocks, numbers.sequence, self._sent.rows.device)
            counts = counts_for(numbers.blocks.sum(0).tolist(), self._sent.rows.device)
            self._orders[part] = TableOrder(numbers.first, numbers.end, counts, numbers.num_rows, pairs)
        return self._orders[part]

    def leave(self, part: int, y: torch.Tensor) -> None:
        """Start to send the results of a part back; if it is the only one, finish does so."""
        if self.num_parts == 1:
            self._results = [y]
        else:
            self._send_back(part, y)

    def result(self, x: torch.Tensor) -> torch.Tensor:
        """Return a ticket."""
        self._orders.clear()
        return x.new_zeros(())

    def finish(self) -> torch.Tensor:
        """Return the sums of the results of each token."""
        if self._results:
            self._send_back(0, self._results.pop())
        (rows,) = self._wait_for_returned()
        return combine_tokens(rows, self._sent)

    def start_back(self, dy: torch.Tensor) -> None:
        """Start to send the gradient of y to the experts."""
        self._arriving = [(self._send(dy, part),) for part in self._parts]

    def arrive_back(self, part: int, dy: torch.Tensor) -> torch.Tensor:
        """Return the gradients of the results of a part."""
        (transfer,) = self._arriving[part]
        self._arriving[part] = ()
        return self._of_all_shards(transfer.wait(), part)

    def leave_back(self, part: int, dx: torch.Tensor, dweights: torch.Tensor) -> None:
        """Start to send the gradients of rows and weights back."""
        self._send_back(part, dx, dweights)

    def gradients(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the gradient of a ticket."""
        return x.new_zeros(()), None

    def finish_back(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of tokens and probabilities."""
        rows, weights = self._wait_for_returned()
        return combine_tokens(rows, self._sent), weights_of_pairs(weights.view(-1), self._sent.places)

    def _send(self, x: torch.Tensor, part: _Part) -> Transfer:
        """Start to send the tokens [T, H] that go to a part."""
        tokens = self._sent.rows[part.begin : part.begin + part.num_sent] // self._num_selected
        table = x.new_empty(part.num_rows, x.shape[1])
        torch.index_select(x, 0, tokens[: part.num_own], out=table[: part.num_own])
        return self._start(x.index_select(0, tokens[part.num_own :]), table, part)

    def _send_sorted(self, rows: torch.Tensor, part: _Part) -> Transfer:
        """Start to send rows [N, ..] that are in the order of the experts already."""
        rows = rows[part.begin : part.begin + part.num_sent]
        table = rows.new_empty(part.num_rows, rows.shape[1])
        table[: part.num_own] = rows[: part.num_own]
        return self._start(rows[part.num_own :], table, part)

    def _start(self, rows: torch.Tensor, table: torch.Tensor, part: _Part) -> Transfer:
        if self._ep_group is None:
            return Transfer((), (table,))
        into = table[part.num_own : part.num_received]
        return Transfer((start_row_exchange(rows, part.sizes, self._ep_group, into),), (table,))

    def _of_all_shards(self, table: torch.Tensor, index: int) -> torch.Tensor:
        """Fill the rest of the table with the rows of the other ranks of etp_group."""
        part = self._parts[index]
        if self._etp > 1:
            rows = table[: part.num_received].repeat(self._etp - 1, 1)
            start_row_exchange(rows, part.shard_sizes, self._etp_group, table[part.num_received :]).wait()
        return table

    def _send_back(self, index: int, *tables: torch.Tensor) -> None:
        """Start to send tables of a part back to the ranks of their rows."""
        part = self._parts[index]
        if index == 0:
            self._returned = tuple(table.new_empty(self._num_sent, table.shape[1]) for table in tables)
        transfers = []
        for table, returned in zip(tables, self._returned, strict=True):
            table = self._sum_over_shards(table, part)
            into = returned[part.begin : part.begin + part.num_sent]
            into[: part.num_own] = table[: part.num_own]
            if self._ep_group is not None:
                rows = table[part.num_own :]
                transfers.append(start_row_exchange(rows, part.sizes_back, self._ep_group, into[part.num_own :]))
        self._returning.append(tuple(transfers))

    def _sum_over_shards(self, table: torch.Tensor, part: _Part) -> torch.Tensor:
        """Return the sums of the ranks of etp_group for the rows that this rank received; in rank order."""
        if self._etp == 1:
            return table
        own = table[: part.num_received]
        others = start_row_exchange(table[part.num_received :], part.shard_sizes_back, self._etp_group).wait()
        parts = list(others.unflatten(0, (self._etp - 1, part.num_received)))
        parts.insert(self._etp_rank, own)
        total = torch.empty_like(own)
        add_in_order(total, parts)
        return total

    def _wait_for_returned(self) -> tuple[torch.Tensor, ...]:
        for transfers in self._returning:
            for transfer in transfers:
                transfer.wait()
        returned, self._returned, self._returning = self._returned, (), []
        return returned
