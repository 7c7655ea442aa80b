"""Best-first search: layouts in the order of a lower bound of their time, until the best are certain."""

import heapq
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from math import log2
from typing import NamedTuple

from fused_megatron.config import TrainConfig
from fused_megatron.planning.engine_memory import DeviceMemory, device_memory
from fused_megatron.planning.prediction.cluster import Cluster
from fused_megatron.planning.prediction.step_time import StepPrediction, predict_step
from fused_megatron.planning.search.floors import Floors
from fused_megatron.planning.search.layouts import (
    Layout,
    Refusals,
    Settings,
    sequence_choices,
    train_config,
    valid_layouts,
)
from fused_megatron.planning.search.pipelines import pipelines
from fused_megatron.planning.search.recomputations import recomputations

NUM_BEST = 10
MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Sizes of microbatches that are searched."""
SAME = 0.005
"""Times that differ by less count as the same: it is far below the error of a prediction."""
_SENDS_ONCE = 1
"""ZeRO stage up to which replicas send once a step; later ones send in every microbatch."""
_SURE = 0.8
"""Share of the waiting time of a simulated pipeline that it has with any recomputation and ZeRO stage."""


@dataclass(frozen=True)
class Plan:
    """A layout that fits, with its predicted time.

    Attributes:
        layout, settings: as found.
        config: the whole config of the run.
        prediction: of a step.
        memory: of the GPU that needs most.
    """

    layout: Layout
    settings: Settings
    config: TrainConfig
    prediction: StepPrediction
    memory: DeviceMemory

    @property
    def memory_bytes(self) -> int:
        """Bytes of the GPU that needs most, with overheads."""
        return self.memory.total


@dataclass
class Search:
    """Result of a search.

    Attributes:
        plans: the best plan of each of the best layouts, the fastest first.
        num_layouts: layouts of this number of GPUs.
        refused: layouts that the model or the batch do not allow, by reason.
        too_large: layouts whose memory is too small with any settings, and the least bytes for each product of tp, pp,
            ep and etp.
        num_too_large: their number.
        num_slower: layouts that fit, or may fit, and whose lower bound is above the last plan.
        num_predicted: steps that were simulated.
        limit_bytes: memory of a GPU.
    """

    plans: list[Plan] = field(default_factory=list)
    num_layouts: int = 0
    refused: Refusals = field(default_factory=Refusals)
    too_large: dict[tuple[int, int], int] = field(default_factory=dict)
    num_too_large: int = 0
    num_slower: int = 0
    num_predicted: int = 0
    limit_bytes: int = 0


def find_best(base: TrainConfig, num_gpus: int, cluster: Cluster, num_best: int = NUM_BEST) -> Search:
    """Find the fastest layouts of a workload that fit, each with its best settings, to a share SAME of the time.

    Settings with the same time are ordered by _surcharge: the simpler ones come first. The same input gives the same
    result.

    Args:
        base: the workload: model, batch, optimizer, dtype; its parallel section is not used.
        num_gpus: GPUs; check_gpus says which numbers are possible.
        cluster: the machine.
        num_best: layouts to find.
    """
    return _BestFirst(base, num_gpus, cluster).run(num_best)


class _Node(NamedTuple):
    """Part of the search in the queue.

    Attributes:
        seconds: lower bound; of a plan, the prediction; with its surcharge.
        order: breaks ties.
        layout: sizes of the axes.
        settings: settings of the run.
        is_open: which settings are still open: all but the microbatches, of pipelines that need no recomputation
            ("none"), that of attention ("selective"), or of whole blocks ("full"); what memory decides ("memory");
            nothing, but what a microbatch sends to replicas is not in the bound ("sending"); "": none.
        plan: a simulated plan.
    """

    seconds: float
    order: int
    layout: Layout
    settings: Settings
    is_open: str = ""
    plan: Plan | None = None


class _BestFirst:
    def __init__(self, base: TrainConfig, num_gpus: int, cluster: Cluster) -> None:
        self.base, self.num_gpus, self.cluster = base.for_device(cluster.device), num_gpus, cluster
        self.floors = Floors(self.base, num_gpus, cluster)
        self.search = Search(limit_bytes=limit_bytes(cluster))
        self.queue: list[_Node] = []
        self.order = count()
        self.waiting: Counter[Layout] = Counter()
        self.best: dict[Layout, tuple[float, Plan]] = {}
        self.bubbles: dict[tuple[Layout, Settings], float] = {}
        self.memories: dict[tuple[Layout, Settings], tuple[TrainConfig, DeviceMemory]] = {}

    def run(self, num_best: int) -> Search:
        self._enqueue_layouts()
        found = self.search.plans
        done: set[Layout] = set()
        while self.queue and len(found) < num_best:
            node = heapq.heappop(self.queue)
            if node.layout in done:
                continue
            self.waiting[node.layout] -= 1
            if node.plan is not None:
                found.append(node.plan)
                done.add(node.layout)
            elif node.is_open:
                self._open(node)
            else:
                self._predict(node.layout, node.settings, node.seconds)
            if not self.waiting[node.layout] and node.layout not in done:
                self._refuse_memory(node.layout)
        self.search.num_slower = len({node.layout for node in self.queue} - done)
        found.sort(key=lambda plan: plan.prediction.seconds)
        return self.search

    def _push(
        self, seconds: float, layout: Layout, settings: Settings, is_open: str = "", plan: Plan | None = None
    ) -> None:
        self.waiting[layout] += 1
        heapq.heappush(self.queue, _Node(seconds, next(self.order), layout, settings, is_open, plan))

    def _enqueue_layouts(self) -> None:
        """Put a node into the queue for each layout, size of microbatches and sequence parallelism."""
        search = self.search
        layouts = valid_layouts(self.base, self.num_gpus, self.cluster, search.refused)
        search.num_layouts = len(layouts) + search.refused.total
        for layout in layouts:
            least = self.floors.least_memory(layout)
            if least > search.limit_bytes:
                self._refuse_memory(layout, least)
                continue
            samples = self.base.training.global_batch_size // layout.dp
            for size in (size for size in MICROBATCHES if samples % size == 0):
                for shards in sequence_choices(self.base, layout):
                    seconds = self.floors.least_seconds(layout, size, shards)
                    settings = Settings(size, shards, "1f1b", 1, zero_stage=self.floors.zero_stages(layout)[-1])
                    self._push(seconds, layout, settings, "none")

    def _refuse_memory(self, layout: Layout, least: int | None = None) -> None:
        self.search.num_too_large += 1
        least = self.floors.least_memory(layout) if least is None else least
        key = (layout.tp * layout.pp, layout.ep * layout.etp)
        self.search.too_large[key] = min(least, self.search.too_large.get(key, least))

    def _open(self, node: _Node) -> None:
        """Put a node into the queue for each pipeline, or for each ZeRO stage of a pipeline."""
        layout, first = node.layout, node.settings
        if node.is_open in ("none", "selective", "full"):
            self._open_pipelines(node)
            return
        if node.is_open == "sending":
            self._push(max(node.seconds, self._floor(layout, first)), layout, first)
            return
        for zero in self.floors.zero_stages(layout):
            settings = first._replace(zero_stage=zero)
            # If every block is recomputed, settings need least memory.
            if self._may_fit(layout, settings._replace(recompute="full", recompute_blocks=None)):
                sends = zero > _SENDS_ONCE
                floor = self._floor(layout, settings, of_actions=sends)
                self._push(max(node.seconds, floor), layout, settings, "sending" if sends else "")

    def _floor(self, layout: Layout, settings: Settings, *, of_actions: bool = False) -> float:
        """Return a lower bound with its surcharge; of_actions: without what every microbatch sends to replicas."""
        return (1 + _surcharge(layout, settings)) * self.floors.seconds(layout, settings, of_actions=of_actions)

    def _open_pipelines(self, node: _Node) -> None:
        """Put a node into the queue for each pipeline that needs this recomputation, and one for all that need more.

        With the bound of the fastest settings that may fit; these are known when the pipeline is opened.
        """
        layout, more = node.layout, False
        for name, per_rank in pipelines(layout.pp, self.base.model.num_layers):
            first = node.settings._replace(schedule=name, stages_per_rank=per_rank)
            none, selective, *parts = recomputations(first, self.base.model.num_layers // layout.pp)
            if node.is_open != "none" and self._may_fit(layout, none):
                continue  # it is in the queue
            if node.is_open == "none":
                chosen = [none] if self._may_fit(layout, none) else []
            elif node.is_open == "selective":
                chosen = [selective, parts[0]] if self._may_fit(layout, selective) else []
            elif self._may_fit(layout, selective) or not self._may_fit(layout, parts[-1]):
                continue
            else:
                chosen = [next(part for part in parts if self._may_fit(layout, part))]
            if chosen:
                settings = first._replace(zero_stage=0)
                seconds = min(self.floors.seconds_of_actions(layout, one) for one in chosen)
                floor = (1 + _surcharge(layout, settings)) * seconds
                self._push(max(node.seconds, floor), layout, settings, "memory")
            more = more or not chosen
        if more and node.is_open != "full":
            # Attention may take longer than a part of the blocks.
            kinds = ("selective", "full") if node.is_open == "none" else ("full",)
            least = min(self.floors.least_seconds(layout, *node.settings[:2], kind) for kind in kinds)
            self._push(max(node.seconds, least), layout, node.settings, kinds[0])

    def _may_fit(self, layout: Layout, settings: Settings) -> bool:
        return self.floors.memory(layout, settings) <= self.search.limit_bytes

    def _open_recomputations(self, layout: Layout, settings: Settings, least_seconds: float) -> None:
        """Put a node into the queue for each recomputation, if settings without any do not fit.

        Recomputation only adds time: where settings without it fit, it has nothing to offer.
        """
        if settings.recompute != "none":
            return
        for chosen in recomputations(settings, self.base.model.num_layers // layout.pp)[1:]:
            if not self._may_fit(layout, chosen):
                continue
            self._push(max(least_seconds, self._floor(layout, chosen)), layout, chosen)

    def _memory(self, layout: Layout, settings: Settings) -> tuple[TrainConfig, DeviceMemory]:
        """Return the config of a layout, and the memory of the GPU that needs most, or of one that needs too much."""
        if (layout, settings) not in self.memories:
            config = train_config(self.base, layout, settings)
            found = []
            for rank in self.floors.fullest_ranks(layout, settings):
                found.append(device_memory(config, self.cluster, pp_rank=rank))
                if found[-1].total > self.search.limit_bytes:
                    break
            self.memories[layout, settings] = config, max(found, key=lambda memory: memory.total)
        return self.memories[layout, settings]

    def _predict(self, layout: Layout, settings: Settings, least_seconds: float) -> None:
        """Simulate a layout that fits, and put it into the queue at its time.

        No other settings of the layout take less than least_seconds. If these take no more, to a share SAME, they are
        the best ones of the layout.
        """
        if not self._may_fit(layout, settings):
            self._open_recomputations(layout, settings, least_seconds)
            return
        config, memory = self._memory(layout, settings)
        if memory.total > self.search.limit_bytes:
            self._open_recomputations(layout, settings, least_seconds)
            return
        pipeline = layout, settings._replace(recompute="none", recompute_blocks=None, zero_stage=0)
        floor = self.floors.seconds(layout, settings)
        likely = (1 + _surcharge(layout, settings)) * floor * (1 + _SURE * (self.bubbles.get(pipeline, 1.0) - 1))
        if layout.pp > 1 and likely > (1 + SAME) * least_seconds:  # a sibling has shown how long this pipeline waits
            self._push(likely, layout, settings)
            return
        self.search.num_predicted += 1
        prediction = predict_step(config, self.cluster)
        self.bubbles[pipeline] = prediction.seconds / floor
        seconds = (1 + _surcharge(layout, settings)) * prediction.seconds
        plan = Plan(layout, settings, config, prediction, memory)
        if layout not in self.best or seconds < self.best[layout][0]:
            self.best[layout] = seconds, plan
        seconds, plan = self.best[layout]
        if seconds <= (1 + SAME) * least_seconds:
            seconds = least_seconds
        self._push(seconds, layout, settings, plan=plan)


def _surcharge(layout: Layout, settings: Settings) -> float:
    """Return a share of the time by which a plan must be better than a simpler one, to come before it.

    A thousandth for each ZeRO stage above 1, for a backward in two parts, for each doubling of context parallelism, and
    for every fourth stage of a rank.
    """
    zero = max(0, settings.zero_stage - 1)
    split = settings.schedule not in ("1f1b", "interleaved_1f1b")
    return 0.001 * (zero + split + log2(layout.cp) + settings.stages_per_rank / 4)


def limit_bytes(cluster: Cluster) -> int:
    """Return the bytes of a GPU."""
    return round(1e9 * cluster.memory_gb)
