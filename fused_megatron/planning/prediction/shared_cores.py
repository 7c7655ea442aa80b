"""Ranks that share the cores of a CPU: threads of each rank, and waits where ranks exceed the cores."""

import dataclasses

from fused_megatron.planning.prediction.cluster import Cluster


def with_threads(cluster: Cluster, threads: int) -> Cluster:
    """Return the constants of a CPU rank with a number of threads; a cluster file holds those of one thread."""
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


def waiting_factor(cluster: Cluster, num_ranks: int) -> float:
    """Return the number of ranks for each core of a CPU, at least 1; 1 on GPUs.

    A step takes at least the mean work of a rank times this factor, however well the waits of ranks for each other are
    filled by other ranks of the core.
    """
    return max(1.0, num_ranks / cluster.gpus_per_node) if cluster.device == "cpu" else 1.0
