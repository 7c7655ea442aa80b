"""Cutting a model into pipeline stages of about equal cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from fused_megatron.checks import check
from fused_megatron.config import TransformerConfig
from fused_megatron.observe.model_flops import block_products


@dataclass(frozen=True)
class StageSpan:
    """What a stage holds: blocks start to stop; the first also the embedding, the last the final norm and the head."""

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
    """The span of every stage.

    Without a cut of the user the dearest rank is as cheap as can be, and then its dearest stage. Cost is
    multiplications per token: of a block those of its four products and of attention, of the head hidden_size x
    vocab_size, of the embedding hidden_size.

    Args:
        config: of the whole model; the cost of the head needs its vocab_size.
        num_stages: how many; each holds a block or more, but that the last may have the head alone.
        cut: blocks of each stage, instead.
        placement: the rank of each stage; None: every stage has a rank of its own.

    Raises:
        InputError: as check_cut; no vocab_size.
    """
    check_cut(config.num_layers, num_stages, cut)
    counts = list(cut) if cut is not None else _cheapest_counts(config, placement or range(num_stages))
    starts = [sum(counts[:index]) for index in range(num_stages)]
    return tuple(
        StageSpan(index, num_stages, start, start + count)
        for index, (start, count) in enumerate(zip(starts, counts, strict=True))
    )


def check_cut(num_layers: int, num_stages: int, cut: Sequence[int] | None = None) -> None:
    """Raise InputError unless so many blocks can be cut into so many stages, and so."""
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
    """Multiplications of a block per token, forward; of attention half, since a token sees half of the others."""
    products = block_products(config)
    return products.projections + products.attention // 2 + products.mlp


def _cheapest_counts(config: TransformerConfig, placement: Sequence[int]) -> list[int]:
    """Blocks of each stage, given the rank of each."""
    check(config.vocab_size is not None, "vocab_size=None must be given to weigh the head against the blocks")
    block, last = block_cost(config), len(placement) - 1
    counts = [1 if stage == 0 or stage < last else 0 for stage in range(last + 1)]
    costs = [block * count for count in counts]
    costs[0] += config.hidden_size
    costs[last] += config.hidden_size * (config.vocab_size or 0)
    for _ in range(config.num_layers - sum(counts)):
        of_rank = {rank: sum(c for c, r in zip(costs, placement, strict=True) if r == rank) for rank in placement}
        # Blocks cost the same, so handing each to the cheapest is best. Of equals the latest: early stages keep more.
        cheapest = min(range(last + 1), key=lambda stage: (of_rank[placement[stage]], costs[stage], -stage))
        costs[cheapest] += block
        counts[cheapest] += 1
    return counts
