"""The smallest number of GPUs on which a workload fits."""

from collections.abc import Iterator
from dataclasses import dataclass

from fused_megatron.config import TrainConfig
from fused_megatron.planning.engine_memory import device_memory
from fused_megatron.planning.prediction.cluster import Cluster
from fused_megatron.planning.search.best_layouts import limit_bytes
from fused_megatron.planning.search.floors import Floors
from fused_megatron.planning.search.layouts import (
    LEAST_POSITIONS,
    Layout,
    Refusals,
    Settings,
    sequence_choices,
    train_config,
    valid_layouts,
)

_MOST_GPUS = 1 << 16


@dataclass(frozen=True)
class Fit:
    """A number of GPUs and a layout that fits on them."""

    num_gpus: int
    layout: Layout
    settings: Settings
    memory_bytes: int


def fewest_gpus(base: TrainConfig, cluster: Cluster, more_than: int) -> Fit | None:
    """Return the fewest GPUs, above more_than, on which a layout fits; None if no number up to 65,536 is enough.

    The GPUs are whole nodes, or a share of one node that divides it. Only the settings with the least memory are tried:
    every block recomputed, microbatches of one sequence.
    """
    base = base.for_device(cluster.device)
    large, model = more_than, base.model
    most_tp, most_cp = min(cluster.gpus_per_node, model.num_heads), max(1, model.seq_len // LEAST_POSITIONS)
    most = min(_MOST_GPUS, base.training.global_batch_size * (model.num_layers + 1) * most_tp * most_cp)
    fit = None
    while fit is None:
        large = next(_numbers(cluster, 2 * large - 1), 0)
        if not large or large > most:
            return None
        fit = _fit(base, cluster, large)
    for number in _numbers(cluster, more_than):
        if number >= large:
            return fit
        if (smaller := _fit(base, cluster, number)) is not None:
            return smaller
    return fit


def _numbers(cluster: Cluster, more_than: int) -> Iterator[int]:
    """Yield the possible numbers of GPUs above a number, ascending."""
    node = cluster.gpus_per_node
    yield from (number for number in range(more_than + 1, node) if node % number == 0)
    yield from range((more_than // node + 1) * node, _MOST_GPUS + 1, node)


def _fit(base: TrainConfig, cluster: Cluster, num_gpus: int) -> Fit | None:
    """Return a layout that fits on this number of GPUs."""
    limit, floors = limit_bytes(cluster), Floors(base, num_gpus, cluster)
    layouts = valid_layouts(base, num_gpus, cluster, Refusals())
    for least, layout in sorted((floors.least_memory(layout), layout) for layout in layouts):
        if least > limit:
            return None
        for zero in reversed(floors.zero_stages(layout)):
            settings = Settings(1, sequence_choices(base, layout)[-1], "1f1b", 1, "full", None, zero)
            ranks = floors.fullest_ranks(layout, settings)
            needed = device_memory(train_config(base, layout, settings), cluster, pp_rank=ranks).total
            if needed <= limit:
                return Fit(num_gpus, layout, settings, needed)
    return None
