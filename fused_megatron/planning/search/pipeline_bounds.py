"""Lower bound of a step with any pipeline of a layout, from its blocks: a search asks for it most often."""

from collections.abc import Callable, Sequence
from operator import le, mul
from typing import NamedTuple

from fused_megatron.config import TransformerConfig
from fused_megatron.models import cut_stages
from fused_megatron.pipeline.schedule.action import stages_of
from fused_megatron.planning.prediction.block_time import StageTimes

Counts = tuple[int, ...]
"""Numbers of units: dense blocks, blocks with experts, of both the recomputed ones, embeddings, heads."""


class Units(NamedTuple):
    """Seconds of each unit of Counts for a microbatch, at the same index; of a recomputed block, what that adds.

    Attributes:
        forward_device, forward_host: of F.
        backward_device, backward_host: of B.
    """

    forward_device: tuple[float, ...]
    forward_host: tuple[float, ...]
    backward_device: tuple[float, ...]
    backward_host: tuple[float, ...]


def units_of(model: TransformerConfig, times: StageTimes, recompute: str) -> Units:
    """Return the seconds of the units of a model; of what is computed again without the collectives.

    Args:
        model: of the run.
        times: of its stages, without recomputation.
        recompute: "selective": attention is computed again in each block.
    """
    nothing = (0.0, 0.0, 0.0, 0.0)
    blocks, again = [nothing, nothing], [nothing, nothing]
    for kind, number in enumerate((model.num_layers - len(model.expert_blocks), len(model.expert_blocks))):
        if number:
            work = times.block(bool(kind), False)
            forward, backward = work.forward, work.backward
            if recompute == "selective":
                backward += times.attention * times.factor
            blocks[kind] = (forward.on_device, forward.host, backward.on_device, backward.host)
            again[kind] = (0.0, 0.0, forward.products + forward.memory_bound, forward.host)
    units = [*blocks, *again, times.embedding.totals[:4], times.head.totals[:4]]
    return Units(*zip(*units, strict=True))


class RankUnits(NamedTuple):
    """Units of a pipeline rank, and of the stages before its first one."""

    own: Counts
    before: Counts

    def is_within(self, other: "RankUnits") -> bool:
        """Return whether the other rank has each of these units, too."""
        return all(map(le, (*self.own, *self.before), (*other.own, *other.before)))


class Pipeline(NamedTuple):
    """A pipeline that is searched.

    Attributes:
        ranks: the ranks that may end last.
        splits: W may follow the last I of a rank.
    """

    ranks: tuple[RankUnits, ...]
    splits: bool

    def is_never_slower(self, other: "Pipeline") -> bool:
        """Return whether no units give this pipeline a higher bound than the other one."""
        longer = all(any(rank.is_within(more) for more in other.ranks) for rank in self.ranks)
        return longer and self.splits >= other.splits


def units_of_ranks(model: TransformerConfig, placement: Sequence[int], recomputed: int) -> tuple[RankUnits, ...]:
    """Return the units of the ranks of a placement that may end last: no other rank has the same ones and more.

    Args:
        model: of the run.
        placement: rank of each stage.
        recomputed: blocks of each stage, the first ones, that are recomputed.
    """
    spans = cut_stages(model, len(placement), placement=placement)

    def counts(stages: Sequence[int]) -> Counts:
        found = [0] * 6
        for stage in stages:
            span = spans[stage]
            for block in range(span.start, span.stop):
                has_experts = model.has_experts(block)
                found[has_experts] += 1
                found[2 + has_experts] += block - span.start < recomputed
            found[4] += span.first
            found[5] += span.last
        return tuple(found)

    ranks: list[RankUnits] = []
    for rank in range(max(placement) + 1):
        stages = stages_of(placement, rank)
        found = RankUnits(counts(stages), counts(range(stages[0])))
        if not any(found.is_within(other) for other in ranks):
            ranks = [*(other for other in ranks if not other.is_within(found)), found]
    return tuple(ranks)


def fastest(pipelines: Sequence[Pipeline]) -> list[Pipeline]:
    """Return the pipelines of which one has the lowest bound, whatever the units take."""
    kept: list[Pipeline] = []
    for found in pipelines:
        if not any(other.is_never_slower(found) for other in kept):
            kept = [*(other for other in kept if not found.is_never_slower(other)), found]
    return kept


def least_seconds(
    pipelines: Sequence[Pipeline],
    units: Units,
    number: int,
    action_s: Callable[[float, float], float],
) -> float:
    """Return a lower bound of the seconds of a step, for the pipeline with the lowest one.

    A rank starts when a microbatch has passed the stages before its first one, then it does its own work. If its last
    action is a whole backward, the stages before its first one still follow. Stages take no less time apart than
    together: the device and the host may each wait for the other in every one of them.

    Args:
        pipelines: to choose from.
        units: seconds of the units.
        number: of microbatches.
        action_s: returns the seconds of an action from the seconds of the device and of the host.
    """

    def seconds(counts: Counts, device: Sequence[float], host: Sequence[float]) -> float:
        return action_s(sum(map(mul, counts, device)), sum(map(mul, counts, host)))

    least = float("inf")
    for pipeline in pipelines:
        most = 0.0
        for own, before in pipeline.ranks:
            work = seconds(own, units.forward_device, units.forward_host)
            work += seconds(own, units.backward_device, units.backward_host)
            waits = seconds(before, units.forward_device, units.forward_host)
            if not pipeline.splits:
                waits += seconds(before, units.backward_device, units.backward_host)
            most = max(most, number * work + waits)
        least = min(least, most)
    return least
