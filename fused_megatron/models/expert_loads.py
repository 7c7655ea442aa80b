"""Loads of a model's experts over a training step: totals over all ranks, and the updates that follow from them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fused_megatron.config import TransformerConfig
from fused_megatron.models.router import NUM_REPORTED, ExpertRouter


@dataclass(frozen=True)
class LoadReport:
    """Loads and losses of the routers in one step, for logs.

    Attributes:
        balance_loss, z_loss: mean over the targets of the step, summed over the blocks, with their coefficients.
        max_over_mean: for each block with experts, the tokens of the expert with most tokens / the mean.
        loads: for each of these blocks the tokens of each expert, over all ranks and microbatches.
        dropped: share of the pairs (token, expert) that exceeded the capacity; None without a capacity.
    """

    balance_loss: float
    z_loss: float
    max_over_mean: dict[int, float]
    loads: dict[int, list[int]]
    dropped: float | None

    def text(self) -> str:
        """Return the load of the expert with most tokens, over all blocks, for a line of the log."""
        return f"  most loaded expert {max(self.max_over_mean.values(), default=1.0):.2f} x mean"

    def metrics(self) -> dict[str, object]:
        """Return the entries of a run's metrics."""
        worst = max(self.max_over_mean.values(), default=1.0)
        entries: dict[str, object] = {
            "balance_loss": self.balance_loss,
            "z_loss": self.z_loss,
            "expert_load_max_over_mean": round(worst, 4),
            "expert_load_max_over_mean_by_block": {
                str(block): round(ratio, 4) for block, ratio in self.max_over_mean.items()
            },
        }
        return entries if self.dropped is None else {**entries, "dropped": round(self.dropped, 6)}


class ExpertLoads:
    """Loads of the experts of a model, or of some of its pipeline stages, over the microbatches of a step.

    Each training forward adds its loads to the routers' buffers. At the end of a step the caller sums of_rank() over
    all ranks, and gives the totals to update().

    Args:
        config: of the whole model.
        modules: the model, or this rank's stages; parameters have their names in the whole model.
    """

    def __init__(self, config: TransformerConfig, modules: Iterable[nn.Module]) -> None:
        self.config = config
        self.routers: dict[int, ExpertRouter] = {}
        for module in modules:
            for name, child in module.named_modules():
                if isinstance(child, ExpertRouter):
                    self.routers[_block_of(name)] = child

    def zero_(self) -> None:
        """Forget the loads of the step under way."""
        for router in self.routers.values():
            router.sums.zero_()

    def of_rank(self, device: torch.device) -> torch.Tensor:
        """Return this rank's loads, [blocks with experts, E + 3] float64 on the device; 0 for blocks of other ranks.

        A row has the entries of ExpertRouter.sums. Without experts there are no rows.
        """
        blocks, experts = self.config.expert_blocks, int(self.config.num_experts or 0)
        loads = torch.zeros(len(blocks), experts + NUM_REPORTED, dtype=torch.float64, device=device)
        for row, block in enumerate(blocks):
            if block in self.routers:
                loads[row] += self.routers[block].sums
        return loads

    def update(self, totals: torch.Tensor, refused: torch.Tensor | None = None) -> None:
        """Move the selection biases of this rank, and keep the loads for the next step's balance loss.

        bias_e += rate * sign(mean load - load_e), as Wang et al. 2024 (arXiv:2408.15664).

        Args:
            totals: of_rank() summed over all ranks; the same on every rank.
            refused: bool tensor of one element on the device; if it is True, nothing changes. None: it is False.
        """
        rate = self.config.router_bias_rate
        for row, block in enumerate(self.config.expert_blocks):
            router = self.routers.get(block)
            if router is None:
                continue
            load = totals[row, : router.num_experts]
            if router.selection_bias is not None and rate:
                # Whole numbers below 2^53: exact, so that an expert with the mean load keeps its bias.
                change = rate * torch.sign(load.sum() - router.num_experts * load).float()
                router.selection_bias += change if refused is None else change.masked_fill(refused, 0.0)
            if router.previous_load is not None:
                before = router.previous_load
                before.copy_(load if refused is None else torch.where(refused, before, load.to(before.dtype)))

    def report(self, totals: torch.Tensor, loss_divisor: float) -> LoadReport:
        """Return the loads and losses of the step.

        Args:
            totals: as in update(), in host memory.
            loss_divisor: number of targets of the step.
        """
        experts = int(self.config.num_experts or 0)
        rows = totals.tolist()
        blocks = self.config.expert_blocks
        loads = {block: [int(load) for load in row[:experts]] for block, row in zip(blocks, rows, strict=True)}
        balance, z, dropped = (sum(row[experts + i] for row in rows) for i in range(NUM_REPORTED))
        pairs = sum(sum(load) for load in loads.values())
        return LoadReport(
            balance / loss_divisor,
            z / loss_divisor,
            {block: max(load) * experts / max(1, sum(load)) for block, load in loads.items()},
            loads,
            None if self.config.capacity_factor is None else dropped / max(1, pairs),
        )


def _block_of(name: str) -> int:
    """Return the index in "blocks.<index>.mlp.router"."""
    return int(name.split(".")[-3])
