"""Ranks that share the cores of a CPU: threads of each rank, and waits where ranks exceed the cores."""

import dataclasses

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


def waiting_s(cluster: Cluster, num_ranks: int, work_s: float, stages: int, num_microbatches: int) -> float:
    """Return the least time of a step whose ranks take turns on the cores of a CPU; 0 on GPUs.

    The waits of a rank for another are filled by other ranks of its core, except at both ends of a pipeline: while
    fewer ranks work than there are cores, cores are idle.

    Args:
        cluster: of one rank.
        num_ranks: ranks that share the cores.
        work_s: mean work of a rank.
        stages: pipeline ranks.
        num_microbatches: of a step.
    """
    cores = cluster.gpus_per_node
    if cluster.device == "cuda" or num_ranks <= cores:
        return 0.0
    of_stage = num_ranks // stages
    idle = sum(max(0, cores - active * of_stage) for active in range(1, stages))
    return work_s * (num_ranks + idle / num_microbatches) / cores
