"""Orders of tokens by expert: of the pairs that a rank sends, and of the rows of a table that it has or receives."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fused_megatron.ops.expert_permutation import ExpertOrder
from fused_megatron.ops.grouped_product import Counts


@dataclass(frozen=True)
class TableOrder:
    """The rows of a table in the order of some of this rank's experts.

    Attributes:
        first, end: these experts are first .. end - 1 of this rank's.
        counts: number of rows of each of them.
        num_rows: N, the number of sorted rows.
        pairs: pairs of a row and an expert, sorted by expert. Its places are [n, k] for a table of n rows.
        filled: [N] bool; False for sorted rows that stand for no pair. None: every row is a pair.
    """

    first: int
    end: int
    counts: Counts
    num_rows: int
    pairs: ExpertOrder
    filled: torch.Tensor | None = None

    def tokens(self) -> torch.Tensor:
        """Return [N], the row of the table of each sorted row."""
        num_experts_of_a_row = self.pairs.places.shape[1]
        return self.pairs.rows if num_experts_of_a_row == 1 else self.pairs.rows // num_experts_of_a_row

    def weights(self, of_pairs: torch.Tensor) -> torch.Tensor:
        """Return [N], the weight of each sorted row, for weights [n, k] of pairs; 0 for a row without a pair."""
        sorted_weights = of_pairs.reshape(-1).index_select(0, self.pairs.rows)
        return sorted_weights if self.filled is None else sorted_weights * self.filled

    def without_pairs(self) -> "TableOrder":
        """Return the order without its large tensors, which an autograd function saves."""
        return replace(self, pairs=ExpertOrder(*(x[:0] for x in self.pairs)))

    def with_pairs(self, pairs: ExpertOrder) -> "TableOrder":
        """Return the order with other tensors."""
        return replace(self, pairs=pairs)


def counts_for(counts: Sequence[int], device: torch.device) -> Counts:
    """Return numbers of rows of experts where products need them: on the host for a CPU, else on the device."""
    return tuple(counts) if device.type in ("cpu", "meta") else _to_device(counts, device)


def weights_of_pairs(sorted_weights: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the values [n, k] of pairs for values [N] of sorted rows; 0 for a pair without a row."""
    num_rows = sorted_weights.shape[0]
    padded = torch.cat([sorted_weights, sorted_weights.new_zeros(1)])
    return padded.index_select(0, places.reshape(-1).clamp(max=num_rows)).view(places.shape)


def fill_slots(experts: torch.Tensor, order: ExpertOrder, slots: int) -> tuple[ExpertOrder, torch.Tensor]:
    """Give each expert the same number of sorted rows: later pairs are dropped, and missing rows are padded.

    Args:
        experts: [T, K] int64; negative for dropped pairs.
        order: of these experts.
        slots: rows for each expert.

    Returns:
        The order, with [E x slots] rows, and [E x slots] bool, False for the rows that stand for no pair.
    """
    num_experts, (num_tokens, num_selected) = order.counts.shape[0], experts.shape
    starts = order.counts.cumsum(0) - order.counts
    position = order.places - starts[experts.clamp(min=0)]
    end = num_experts * slots
    places = torch.where((experts >= 0) & (position < slots), experts * slots + position, end)
    rows = torch.full((end + 1,), -1, dtype=torch.int64, device=experts.device)
    rows[places.reshape(-1)] = torch.arange(num_tokens * num_selected, device=experts.device)
    rows = rows[:-1]  # the last one has dropped pairs
    return ExpertOrder(rows.clamp(min=0), places, torch.full_like(order.counts, slots)), rows >= 0


def reorder_experts(order: ExpertOrder, counts: np.ndarray, sequence: np.ndarray) -> ExpertOrder:
    """Return pairs in another sequence of the experts.

    Args:
        order: pairs in the order of the experts, with as many rows as counts says.
        counts: [E], the rows of each expert.
        sequence: [E], the experts in their new sequence.
    """
    if (sequence == np.arange(len(sequence))).all():
        return order
    starts, ends = np.cumsum(counts) - counts, np.empty_like(counts)
    in_sequence = counts[sequence]
    ends[sequence] = np.cumsum(in_sequence) - in_sequence
    device, num_rows = order.rows.device, int(counts.sum())
    back = _shifts((starts - ends)[sequence], in_sequence, num_rows, device)
    rows = order.rows.index_select(0, torch.arange(num_rows, device=device) + back)
    places = order.places + weights_of_pairs(_shifts(ends - starts, counts, num_rows, device), order.places)
    return ExpertOrder(rows, places, order.counts)


def order_of_blocks(counts: np.ndarray, sequence: np.ndarray, device: torch.device) -> ExpertOrder:
    """Return the order by expert, then by block, of rows that come by block, then by expert.

    Args:
        counts: [blocks, experts], the rows of each block for each expert.
        sequence: [blocks], the blocks in the order in which an expert takes their rows.
        device: of the tensors.
    """
    num_rows = int(counts.sum())
    numbers = torch.arange(num_rows, device=device)
    if counts.shape[0] == 1:
        return ExpertOrder(numbers, numbers[:, None], numbers[:0])
    of_block, of_expert = counts.reshape(-1), counts[sequence].T.reshape(-1)
    starts, ends = (np.cumsum(of_block) - of_block).reshape(counts.shape), np.empty_like(counts)
    ends[sequence] = (np.cumsum(of_expert) - of_expert).reshape(counts.T.shape).T
    places = numbers + _shifts((ends - starts).reshape(-1), of_block, num_rows, device)
    rows = numbers + _shifts((starts - ends)[sequence].T.reshape(-1), of_expert, num_rows, device)
    return ExpertOrder(rows, places[:, None], numbers[:0])


def _shifts(shifts: np.ndarray, counts: np.ndarray, num_rows: int, device: torch.device) -> torch.Tensor:
    """Return [num_rows]: each shift as often as counts says. The device gets a few numbers, and no host waits."""
    values, times = (_to_device(x.tolist(), device) for x in (shifts, counts))
    return values.repeat_interleave(times, output_size=num_rows)


def _to_device(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
