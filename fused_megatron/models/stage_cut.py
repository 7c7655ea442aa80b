"""Cut of a model into pipeline stages of about equal cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from fused_megatron.checks import check
from fused_megatron.config import TransformerConfig
from fused_megatron.observe.model_flops import block_products


@dataclass(frozen=True)
class StageSpan:
    """Blocks of a pipeline stage: start to stop, without stop.

    The first stage also holds the embedding, the last stage the final norm and the head.
    """

    index: int
    num_stages: int
    start: int
    stop: int

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.num_stages - 1


def cut_stages(
    config: TransformerConfig,
    num_stages: int,
    cut: Sequence[int] | None = None,
    *,
    placement: Sequence[int] | None = None,
) -> tuple[StageSpan, ...]:
    """Return the span of every stage.

    If `cut` is None, minimise the cost of the most expensive rank, then of its most expensive stage. Cost counts
    multiplications per token: block_cost for a block, hidden_size * vocab_size for the head, hidden_size for the
    embedding.

    Args:
        config: of the whole model; the cost of the head needs config.vocab_size.
        num_stages: number of stages. Each holds at least one block; only the last may hold none, just the head.
        cut: number of blocks of each stage; None: choose by cost.
        placement: the rank of each stage; None: every stage has a rank of its own.

    Raises:
        InputError: as check_cut; vocab_size is None.
    """
    check_cut(config.num_layers, num_stages, cut)
    counts = list(cut) if cut is not None else _cheapest_counts(config, placement or range(num_stages))
    starts = [sum(counts[:index]) for index in range(num_stages)]
    return tuple(
        StageSpan(index, num_stages, start, start + count)
        for index, (start, count) in enumerate(zip(starts, counts, strict=True))
    )


def check_cut(num_layers: int, num_stages: int, cut: Sequence[int] | None = None) -> None:
    """Raise InputError unless num_layers blocks can be cut into num_stages stages, and by `cut` if it is given."""
    check(num_stages >= 1, f"num_stages={num_stages} must be 1 or more")
    least = max(1, num_stages - 1)
    check(
        num_layers >= least,
        f"num_layers={num_layers} must be at least {least}: of the {num_stages} pipeline stages each needs a block, "
        "but for the last, which has the head (fewer pipeline_parallel_size or stages_per_rank, or more layers)",
    )
    if cut is None:
        return
    shown = list(cut)
    check(
        len(cut) == num_stages,
        f"pipeline_cut={shown} must have one number of blocks for each of the {num_stages} stages, not {len(cut)}",
    )
    check(
        min(cut) >= 0 and 0 not in cut[: max(1, num_stages - 1)],
        f"pipeline_cut={shown} must give every stage 1 block or more (the last, which has the head, may have 0)",
    )
    check(
        sum(cut) == num_layers,
        f"pipeline_cut={shown} has {sum(cut)} blocks: the sum must be num_layers={num_layers}",
    )


def block_cost(config: TransformerConfig) -> int:
    """Count the multiplications of a block per token, forward; attention by half, for its causal mask.

    Blocks with and without experts count as their mean.
    """
    total = 0
    for block in range(config.num_layers):
        products = block_products(config, config.has_experts(block))
        total += products.projections + products.attention // 2 + products.mlp
    return total // config.num_layers


def _cheapest_counts(config: TransformerConfig, placement: Sequence[int]) -> list[int]:
    """Choose the number of blocks of each stage; placement holds the rank of each stage."""
    check(config.vocab_size is not None, "vocab_size=None must be given to weigh the head against the blocks")
    return list(
        _counts_of(
            block_cost(config),
            config.hidden_size,
            config.hidden_size * (config.vocab_size or 0),
            config.num_layers,
            tuple(placement),
        )
    )


@lru_cache(maxsize=256)
def _counts_of(block: int, embedding: int, head: int, num_layers: int, placement: tuple[int, ...]) -> tuple[int, ...]:
    """Return the number of blocks of each stage, for the costs of a block, the embedding and the head."""
    last = len(placement) - 1
    counts = [1 if stage == 0 or stage < last else 0 for stage in range(last + 1)]
    costs = [block * count for count in counts]
    costs[0] += embedding
    costs[last] += head
    of_rank = dict.fromkeys(placement, 0)
    for stage, rank in enumerate(placement):
        of_rank[rank] += costs[stage]
    for _ in range(num_layers - sum(counts)):
        # All blocks cost the same, so giving each to the cheapest stage is best. Ties go to the latest stage: early
        # stages hold the activations of more microbatches.
        cheapest = min(range(last + 1), key=lambda stage: (of_rank[placement[stage]], costs[stage], -stage))
        costs[cheapest] += block
        of_rank[placement[cheapest]] += block
        counts[cheapest] += 1
    return tuple(counts)
