"""Number of chunks of a layer: a fixed number, or the choice of a cost model that measures the group once.

Where torch has a fused product over symmetric memory, it, the whole product and the product in chunks are timed at the
layer's shape, and the fastest is kept. Both run once for every shape; later calls look the choice up.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fused_megatron.checks import check
from fused_megatron.collectives.groups import Group, group_size
from fused_megatron.overlap.cost_model import OverlapCosts, Stretch
from fused_megatron.overlap.group_costs import overlap_costs
from fused_megatron.overlap.symmetric_memory import applies
from fused_megatron.overlap.timed_ways import Chosen, Operands, Run, RunMLP, fastest, layers_are_faster

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChunkChoice:
    """Rule by which a linear layer chooses its number of chunks.

    Attributes:
        fixed: the number of chunks; None lets the cost model of the group choose.
    """

    fixed: int | None = None

    def __post_init__(self) -> None:
        check(self.fixed is None or self.fixed >= 1, f"overlap={self.fixed} must be at least 1 chunk")

    def for_reduction(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        dim: int | None,
        group: Group,
        hidden_products: int = 1,
        run: Run | None = None,
    ) -> int:
        """Choose the number of chunks of x [.., I] @ weight [O, I].T, whose result is summed over the ranks.

        Args:
            x: operand, this rank's.
            weight: operand, this rank's.
            dim: the dim over which the sum is scattered; None for an all-reduce.
            group: the ranks.
            hidden_products: 2 if a product of the same size follows, under which the collective may run; else 1.
            run: runs it, for the ways that are timed; None: nothing is timed.
        """
        chosen = self.decide_reduction(x, weight, dim, group, hidden_products, run)
        return self._unmeasured(group, x) if chosen is None else chosen.num_chunks

    def decide_reduction(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        dim: int | None,
        group: Group,
        hidden_products: int = 1,
        run: Run | None = None,
    ) -> Chosen | None:
        """Return the choice of for_reduction with its times; None if nothing is measured."""
        costs = None if group_size(group) == 1 or x.numel() == 0 else self.measured(group, x)
        if costs is None:
            return None
        assert group is not None
        rows, elements = _rows(x), weight.numel()
        product_s = rows * elements * (2 / costs.flops_per_s)
        # A reduce-scatter moves half the bytes of an all-reduce, whose speed was measured.
        moved = 1.0 if dim is None else 0.5
        sum_s = moved * rows * weight.shape[0] * (x.element_size() / costs.bytes_per_s)
        stretch = Stretch(product_s, sum_s, after_s=(hidden_products - 1) * product_s)
        chosen = _chosen(costs, (stretch,), rows, elements, group, x.device)
        return self._timed(costs, run, x, weight, dim, group, chosen, x.shape, followed=hidden_products > 1)

    def for_gather(self, x: torch.Tensor, weight: torch.Tensor, dim: int, group: Group, run: Run | None = None) -> int:
        """Choose the number of chunks of x @ weight [O, I].T, where x [.., I] of all ranks is gathered along dim."""
        chosen = self.decide_gather(x, weight, dim, group, run)
        return self._unmeasured(group, x) if chosen is None else chosen.num_chunks

    def decide_gather(
        self, x: torch.Tensor, weight: torch.Tensor, dim: int, group: Group, run: Run | None = None
    ) -> Chosen | None:
        """Return the choice of for_gather with its times; None if nothing is measured."""
        costs = None if group_size(group) == 1 or x.numel() == 0 else self.measured(group, x)
        if costs is None:
            return None
        assert group is not None
        ranks, rows, elements = group_size(group), _rows(x), weight.numel()
        own_s = rows * elements * (2 / costs.flops_per_s)
        # An all-gather moves half the bytes of an all-reduce, whose speed was measured.
        gather_s = ranks * x.numel() * (x.element_size() / costs.bytes_per_s) / 2
        stretch = Stretch((ranks - 1) * own_s, gather_s=gather_s, before_s=own_s)
        chosen = _chosen(costs, (stretch,), rows, (ranks - 1) * elements, group, x.device)
        gathered = (*x.shape[:dim], ranks * x.shape[dim], *x.shape[dim + 1 :])
        return self._timed(costs, run, x, weight, dim, group, chosen, gathered)

    def for_mlp(self, x: torch.Tensor, ranks: int, weight_elements: int, group: Group) -> tuple[int, int]:
        """Choose the numbers of chunks of rows that go through both products of an MLP: (forward, backward).

        x is one of `ranks` sequence shards, or replicated (ranks=1). With shards both numbers are the same, since the
        chunks define the order of the rows that forward saves.
        """
        both = self.decide_mlp(x, ranks, weight_elements, group)
        if both is None:
            return (self._unmeasured(group, x),) * 2
        return both[0].num_chunks, both[1].num_chunks

    def decide_mlp(
        self, x: torch.Tensor, ranks: int, weight_elements: int, group: Group
    ) -> tuple[Chosen, Chosen] | None:
        """Return the choices of for_mlp with their times; None if nothing is measured."""
        costs = None if group_size(group) == 1 or x.numel() == 0 else self.measured(group, x)
        if costs is None:
            return None
        assert group is not None
        rows = ranks * _rows(x)
        gathered = 0.5 if ranks > 1 else 0.0  # an all-gather, or a reduce-scatter, sends half of an all-reduce
        products_s = rows * weight_elements * (2 / costs.flops_per_s)
        sum_s = rows * x.shape[-1] * (x.element_size() / costs.bytes_per_s)
        forward = Stretch(products_s, (1 - gathered) * sum_s, gathered * sum_s)
        # Backward gathers x again, before the sums. Its order in the queue of transfers does not matter.
        backward = Stretch(products_s, sum_s, gathered * sum_s, after_s=products_s)
        rest = rows, weight_elements, group, x.device
        if ranks == 1:
            return _chosen(costs, (forward,), *rest), _chosen(costs, (backward,), *rest)
        number = _chosen(costs, (forward, backward), *rest).num_chunks
        return _in_chunks(costs, (forward,), number, weight_elements), _in_chunks(
            costs, (backward,), number, weight_elements
        )

    def for_exchange(self, x: torch.Tensor, num_rows: int, weight_elements: int, group: Group) -> int:
        """Choose the number of parts of the experts of a rank, whose rows ranks exchange before and after the products.

        Args:
            x: [.., H], the tokens of this rank.
            num_rows: most rows that a rank receives; the same on every rank.
            weight_elements: elements of the weights that a row is multiplied with.
            group: the ranks that exchange.
        """
        chosen = self.decide_exchange(x, num_rows, weight_elements, group)
        if chosen is None:
            return 1 if num_rows == 0 or group_size(group) == 1 else self.fixed or 1
        return chosen.num_chunks

    def decide_exchange(self, x: torch.Tensor, num_rows: int, weight_elements: int, group: Group) -> Chosen | None:
        """Return the choice of for_exchange with its times, of forward and backward; None if nothing is measured."""
        if group_size(group) == 1 or num_rows == 0:
            return None
        costs = self.measured(group, x)
        if costs is None:
            return None
        assert group is not None
        num_rows = 1 << (num_rows - 1).bit_length()  # routes differ from step to step, and the choice is cached
        product_s = num_rows * weight_elements * (2 / costs.flops_per_s)
        # An exchange moves half the bytes of an all-reduce, whose speed was measured.
        exchange_s = num_rows * x.shape[-1] * (x.element_size() / costs.bytes_per_s) / 2
        forward = Stretch(product_s, exchange_s, exchange_s)
        backward = Stretch(2 * product_s, exchange_s, exchange_s)
        return _chosen(costs, (forward, backward), num_rows, 0, group, x.device)

    def prefers_layers(
        self, x: torch.Tensor, weights: Sequence[torch.Tensor], dim: int | None, group: Group, run: RunMLP
    ) -> bool:
        """Whether an MLP runs faster layer by layer, with torch's fused ops, than in chunks of rows.

        Args:
            x: input, this rank's.
            weights: of the expansion and of the projection.
            dim: the dim of x that is sharded; None if x is replicated.
            group: the ranks.
            run: runs the forward in both ways, which are timed.
        """
        if x.numel() == 0 or not applies(x, dim):
            return False
        costs = self.measured(group, x)
        if costs is None or not costs.symmetric_memory:
            return False
        assert group is not None
        shapes = tuple(x.shape), *(tuple(weight.shape) for weight in weights)
        return layers_are_faster(run, shapes, x.dtype, x.device, group)

    def _unmeasured(self, group: Group, x: torch.Tensor) -> int:
        """Return the number of chunks where no costs are known."""
        return 1 if group_size(group) == 1 or x.numel() == 0 else self.fixed or 1

    def _timed(
        self,
        costs: OverlapCosts,
        run: Run | None,
        x: torch.Tensor,
        weight: torch.Tensor,
        dim: int | None,
        group: dist.ProcessGroup,
        chosen: Chosen,
        whole_shape: Sequence[int],
        followed: bool = False,
    ) -> Chosen:
        """Return the choice among timed ways on a GPU, else the choice of the cost model."""
        with_fused = costs.symmetric_memory and applies(x, dim)
        if run is None or not (with_fused or x.is_cuda):
            return chosen
        operands = Operands(
            tuple(x.shape),
            tuple(weight.shape),
            weight.is_contiguous(),
            tuple(whole_shape),
            x.dtype,
            x.device,
            followed,
        )
        return fastest(run, operands, dim, group, chosen, with_fused)

    def measured(self, group: Group, like: torch.Tensor) -> OverlapCosts | None:
        """Return the costs of the group for tensors like this, measured now or before.

        None if there is nothing to choose (a fixed number, one rank) or to measure (meta tensors, a fake group).
        """
        if self.fixed is not None or group is None or group_size(group) == 1 or like.is_meta:
            return None
        return overlap_costs(group, like.dtype, like.device)

    def __str__(self) -> str:
        """Return the text for extra_repr."""
        return {None: "auto", 1: "off"}.get(self.fixed, f"{self.fixed} chunks")


@functools.lru_cache(maxsize=4096)
def _chosen(
    costs: OverlapCosts,
    stretches: tuple[Stretch, ...],
    rows: int,
    weight_elements: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> Chosen:
    """Return the choice of the cost model, cached by arguments."""
    num_chunks = costs.num_chunks(stretches, rows, weight_elements)
    chosen = _in_chunks(costs, stretches, num_chunks, weight_elements)
    _LOG.info(
        "overlap over %d ranks%s: %d rows %s (product %.2g ms, transfer %.2g ms)",
        group.size(),
        _nccl_share(group, device),
        rows,
        chosen.means,
        1e3 * chosen.product_s,
        1e3 * chosen.transfer_s,
    )
    return chosen


def _in_chunks(costs: OverlapCosts, stretches: Sequence[Stretch], num_chunks: int, weight_elements: int) -> Chosen:
    """Return a choice with the times that the cost model predicts."""
    product_s = sum(stretch.before_s + stretch.product_s + stretch.after_s for stretch in stretches)
    transfers = [each for stretch in stretches for each in (stretch.gather_s, stretch.reduce_s) if each]
    transfer_s = sum(transfers) + costs.latency_s * len(transfers)
    exposed_s = costs.step_s(stretches, num_chunks, weight_elements) - product_s
    return Chosen(num_chunks, product_s, transfer_s, max(0.0, exposed_s))  # rounding must not make it negative


def _rows(x: torch.Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


def _nccl_share(group: dist.ProcessGroup, device: torch.device) -> str:
    """Return the text for the log line on the most SMs that NCCL takes from products, as set by init_mesh."""
    if device.type != "cuda":
        return ""
    config = getattr(getattr(group._get_backend(device), "options", None), "config", None)
    most = getattr(config, "max_ctas", 0)
    return f", at most {most} SMs for NCCL" if 0 < most < 1024 else ""  # NCCL's own default is "undefined"


_PLAIN = ChunkChoice(1)
_AUTO = ChunkChoice(None)


def chunk_choice(overlap: bool | int) -> ChunkChoice:
    """Convert a user's `overlap`: True for the cost model, False for whole products, or a number of chunks.

    Raises:
        InputError: a number below 1.
    """
    if isinstance(overlap, bool):
        return _AUTO if overlap else _PLAIN
    return ChunkChoice(overlap)
