"""A run on the nodes of a cluster: its layout, from the config or from the planner, and the words that start it."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_megatron.checks import InputError, check, check_positive
from fused_megatron.config import ParallelConfig, TrainConfig
from fused_megatron.config.config_file import load_config
from fused_megatron.planning.command_line import layout_words, on_ranks, text_table, with_vocabulary
from fused_megatron.planning.engine_memory import device_memory
from fused_megatron.planning.prediction.cluster import Cluster, load_cluster
from fused_megatron.planning.search.best_layouts import find_best, limit_bytes
from fused_megatron.planning.search.fewest_gpus import fewest_gpus
from fused_megatron.planning.search.model_source import read_workload
from fused_megatron.planning.search.pitfalls import pitfalls

STOPPED_CODE = 75
"""Exit code of a rank that was asked to end and has saved, so that a scheduler knows it from a run that is done."""
DEFAULT_CLUSTER = "h100-80gb"
_MOST_NODES = 100_000
_SIZES = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "context_parallel_size",
    "data_parallel_size",
    "expert_parallel_size",
    "expert_tensor_parallel_size",
)
_REFUSED = 3
"""Reasons against layouts that an error names."""


@dataclass(frozen=True)
class ClusterJob:
    """A run on some nodes.

    Attributes:
        config_path: the user's config, as given.
        config: with the layout of these nodes.
        words: options of `train`: the user's, then the options that give the config this layout.
        num_nodes: nodes of the job.
        cluster: the machine; gpus_per_node is the number of ranks of a node.
        whole_nodes: whether the ranks take all GPUs of each node.
        origin: whether the layout is the config's or the planner's, as text.
        warnings: of pitfalls.
    """

    config_path: Path
    config: TrainConfig
    words: tuple[str, ...]
    num_nodes: int
    cluster: Cluster
    whole_nodes: bool
    origin: str
    warnings: tuple[str, ...]

    @property
    def num_ranks(self) -> int:
        """Ranks of all nodes."""
        return self.num_nodes * self.cluster.gpus_per_node

    @property
    def train_words(self) -> list[str]:
        """The words behind `python -m fused_megatron`."""
        return ["train", str(self.config_path), *self.words]

    def description(self) -> list[str]:
        """Return the lines for the head of a file: layout, memory, place of the ranks, warnings."""
        memory = device_memory(with_vocabulary(self.config), self.cluster).total / 1e9
        nodes = f"{nodes_text(self.num_nodes)} of {self.cluster.gpus_per_node} ({self.cluster.name})"
        return [
            f"{self.num_ranks:,} ranks: {nodes}",
            f"layout: {self.origin}",
            f"memory of the fullest rank: {memory:.1f} GB of {self.cluster.memory_gb:g} GB",
            *text_table([["axis", "ranks", "distance", "where"], *self._axes()], left=(0, 3)),
            *(f"warning: {text}" for text in self.warnings),
        ]

    def _axes(self) -> list[list[str]]:
        """Return a row for each axis: size, distance of neighbours, and where they lie, as Mesh orders ranks."""
        parallel, node = self.config.parallel, self.cluster.gpus_per_node
        sizes = {
            "tp": parallel.tensor_parallel_size,
            "cp": parallel.context_parallel_size,
            "dp": parallel.data_parallel_size or 1,
            "pp": parallel.pipeline_parallel_size,
        }
        rows, distance = [], 1
        for axis, size in sizes.items():
            if size > 1 or axis == "tp":
                inside = distance * size <= node
                where = "inside a node" if inside else "between nodes" if distance >= node else "inside and between"
                rows.append([axis, f"{size:,}", f"{distance:,}", where if size > 1 else "-"])
            distance *= size
        return rows


def plan_job(
    config_path: Path,
    overrides: Sequence[str],
    *,
    num_nodes: int,
    gpus_per_node: int | None = None,
    cluster_name: str | None = None,
    search: bool = False,
) -> ClusterJob:
    """Return the job of a config on some nodes.

    A config with a size above 1 in [parallel], or with data_parallel_size, keeps its layout; the planner finds the
    layout of any other config.

    Args:
        config_path: the config.
        overrides: options of `train`.
        num_nodes: nodes.
        gpus_per_node: ranks of a node; None: the GPUs of a node of the cluster.
        cluster_name: as load_cluster; None: training.cluster of the config, or DEFAULT_CLUSTER.
        search: let the planner choose in any case.

    Raises:
        InputError: no such config or cluster, 0 nodes, more ranks than a node has GPUs, a layout of another number of
            ranks, or a model that does not fit.
    """
    check_positive("nodes", num_nodes)
    check(num_nodes <= _MOST_NODES, f"nodes={num_nodes} must be {_MOST_NODES:,} or fewer")
    config = load_config(config_path, overrides)
    config.model.check_trainable()
    cluster = load_cluster(cluster_name or config.training.cluster or DEFAULT_CLUSTER)
    whole = cluster.gpus_per_node
    if gpus_per_node is not None:
        check_positive("gpus_per_node", gpus_per_node)
        check(
            gpus_per_node <= whole,
            f"gpus_per_node={gpus_per_node} must be at most {whole}, the GPUs of a node of {cluster.name}",
        )
        cluster = dataclasses.replace(cluster, gpus_per_node=gpus_per_node)
    if has_layout(config.parallel) and not search:
        chosen, origin = _kept(config, num_nodes, cluster), "of the config (--search lets the planner choose)"
        words: list[str] = []
    else:
        chosen, origin = _searched(config_path, overrides, num_nodes, cluster)
        words = layout_words(config, chosen)
    return ClusterJob(
        config_path,
        chosen,
        (*overrides, *words),
        num_nodes,
        cluster,
        cluster.gpus_per_node == whole,
        origin,
        tuple(pitfalls(with_vocabulary(chosen), cluster)),
    )


def nodes_text(number: int) -> str:
    """Return "1 node", "8 nodes"."""
    return f"{number:,} node{'s' if number > 1 else ''}"


def has_layout(parallel: ParallelConfig) -> bool:
    """Return whether the config gives a layout: a size other than its default."""
    default = ParallelConfig()
    return any(getattr(parallel, name) != getattr(default, name) for name in _SIZES)


def _kept(config: TrainConfig, num_nodes: int, cluster: Cluster) -> TrainConfig:
    """Return the config with the data-parallel size of these nodes; raise InputError if it does not fit."""
    ranks, parallel = num_nodes * cluster.gpus_per_node, config.parallel
    place = f"{nodes_text(num_nodes)} of {cluster.gpus_per_node} GPUs"
    way_out = "(--search lets the planner choose the layout)"
    if parallel.data_parallel_size is not None:
        check(
            parallel.num_ranks == ranks,
            f"[parallel] of the config has {parallel.num_ranks:,} ranks, but {place} have {ranks:,} {way_out}",
        )
    else:
        try:
            config = on_ranks(config, ranks)
            config.check_data_parallel(config.parallel.data_parallel_size or 1)
        except InputError as error:
            raise InputError(f"[parallel] of the config does not fit {place}: {error} {way_out}") from None
    needed, limit = device_memory(with_vocabulary(config), cluster).total, limit_bytes(cluster)
    check(
        needed <= limit,
        f"[parallel] of the config does not fit {place}: a rank needs {needed / 1e9:.1f} GB, and {cluster.name} has "
        f"{cluster.memory_gb:g} GB {way_out}",
    )
    return config


def _searched(path: Path, overrides: Sequence[str], num_nodes: int, cluster: Cluster) -> tuple[TrainConfig, str]:
    """Return the config with the planner's fastest layout, and its description."""
    ranks = num_nodes * cluster.gpus_per_node
    workload = read_workload(str(path), overrides, num_gpus=ranks)
    found = find_best(workload.config, ranks, cluster, num_best=1)
    if not found.plans:
        place = f"{nodes_text(num_nodes)} of {cluster.gpus_per_node} x {cluster.name}"
        fit = fewest_gpus(workload.config, cluster, ranks) if found.too_large else None
        if fit is not None:
            enough = math.ceil(fit.num_gpus / cluster.gpus_per_node)
            raise InputError(f"{path.name} does not fit {place}: it needs {enough} (--nodes {enough})")
        reasons = "; ".join(found.refused.lines()[:_REFUSED]) or "no layout has enough memory"
        raise InputError(f"{path.name} has no layout on {place}: {reasons} (another --nodes or global_batch_size)")
    best = found.plans[0]
    seconds, low, high = (best.prediction.seconds, best.prediction.low_s, best.prediction.high_s)
    return best.config, f"of the planner: {best.layout}, {seconds:.3g} s a step predicted ({low:.3g} to {high:.3g})"
