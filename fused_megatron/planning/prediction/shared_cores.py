"""Ranks that share the cores of a CPU: threads of each rank, and turns where ranks exceed the cores."""

import dataclasses
import math
from collections.abc import Sequence

from fused_megatron.pipeline.view.processor_sharing import Task, times_on_cores
from fused_megatron.planning.prediction.cluster import Cluster


def with_threads(cluster: Cluster, threads: int) -> Cluster:
    """Return the constants of a CPU rank with this number of threads; a file has one thread's."""
    if cluster.device == "cuda" or threads == 1:
        return cluster
    return dataclasses.replace(
        cluster,
        peak_tflops=cluster.peak_tflops * threads,
        memory_gb_per_s=cluster.memory_gb_per_s * threads,
    )


def of_one_rank(cluster: Cluster, num_ranks: int) -> Cluster:
    """Return the constants of one of the ranks of a run; the ranks of a CPU divide its cores, as `launch` does."""
    return with_threads(cluster, max(1, cluster.gpus_per_node // num_ranks))


def cores_of_stages(cluster: Cluster, num_ranks: int, stages: int) -> float:
    """Return how many pipeline ranks compute at full speed at once, each with its tensor-parallel ranks and replicas.

    Args:
        cluster: of one rank.
        num_ranks: ranks that share the cores of a CPU.
        stages: pipeline ranks.
    """
    if cluster.device == "cuda" or num_ranks <= cluster.gpus_per_node:
        return math.inf
    return cluster.gpus_per_node / (num_ranks // stages)


def ends_on_cores(begins: Sequence[float], works: Sequence[float], cores: float) -> list[float]:
    """Return when pipeline ranks end the work that each begins at its time.

    Args:
        begins, works: by rank, in seconds.
        cores: of cores_of_stages.
    """
    tasks = [Task(rank, work, earliest=begin) for rank, (begin, work) in enumerate(zip(begins, works, strict=True))]
    return times_on_cores(tasks, cores)[1]
