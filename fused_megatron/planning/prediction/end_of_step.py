"""Times of a step beside the actions of its pipeline: messages of stages, reduction of gradients, the update."""

from fused_megatron.config import ParallelConfig
from fused_megatron.data_parallel.placement import ZERO_STAGES, zero_stage
from fused_megatron.planning.prediction.cluster import Cluster
from fused_megatron.planning.prediction.engine import Engine
from fused_megatron.planning.prediction.transfer_time import Ring, ring_of

_GLOO_GATHER_PASSES = 30
"""Passes over memory that a gather of gloo is worth: it receives into new pages, which fault, and copies twice."""


def replica_ring(cluster: Cluster, parallel: ParallelConfig) -> Ring:
    """Return the links between replicas of the same weights."""
    replicas = parallel.replicas(parallel.data_parallel_size or 1)
    return ring_of(cluster, min(replicas, parallel.zero_shard_size or replicas), parallel.tensor_parallel_size)


def exposed_s(cluster: Cluster, transfer_s: float, computation_s: float) -> float:
    """Return the seconds that a transfer beside a computation adds to it."""
    return transfer_s - cluster.transfer_overlap * min(transfer_s, computation_s)


def message_s(cluster: Cluster, engine: Engine, parallel: ParallelConfig, num_bytes: int) -> float:
    """Return the seconds of a message of num_bytes to the next stage."""
    stride = parallel.tensor_parallel_size * parallel.replicas(parallel.data_parallel_size or 1)
    sent = ring_of(cluster, parallel.pipeline_parallel_size, stride).message_s(num_bytes)
    return sent + 1e-6 * cluster.launch_us * engine.message_ops


def tied_s(cluster: Cluster, engine: Engine, parallel: ParallelConfig, num_elements: int) -> float:
    """Return the seconds in which the first and the last stage add up the gradients of a table that both hold.

    Args:
        cluster, engine, parallel: of the run.
        num_elements: of the table, on a tensor-parallel rank.
    """
    if not engine.sums_tied_tables:
        return 0.0
    replicas = parallel.replicas(parallel.data_parallel_size or 1)
    rows = replicas if ZERO_STAGES[zero_stage(parallel.zero_stage, replicas)].state else 1
    num_bytes = engine.gradient_bytes * num_elements / rows
    distance = (parallel.pipeline_parallel_size - 1) * parallel.tensor_parallel_size * replicas
    sent = Ring(cluster, 2, distance).message_s(num_bytes)
    copied = _GLOO_GATHER_PASSES * num_bytes / (1e9 * cluster.memory_gb_per_s)
    return sent + copied if cluster.device == "cpu" else sent


def reduction_s(
    cluster: Cluster,
    engine: Engine,
    parallel: ParallelConfig,
    element_bytes: int,
    num_parameters: int,
    last_backwards_s: float,
) -> float:
    """Return the seconds of a rank's reduction of gradients and of its gather of updated weights that nothing hides.

    Args:
        cluster, engine, parallel: of the run.
        element_bytes: of a weight.
        num_parameters: of the rank.
        last_backwards_s: seconds of the last backward of each of the rank's stages, which may hide the reduction.
    """
    ring = replica_ring(cluster, parallel)
    if ring.size == 1:
        return 0.0
    placements = ZERO_STAGES[zero_stage(parallel.zero_stage, ring.size)]
    gather = ring.gather_s(element_bytes * num_parameters)
    if placements.gradients:  # reduced in every microbatch; with sharded weights, a gather of each step belongs to it
        return gather if not placements.weights or parallel.zero_gather == "step" else 0.0
    gradients = engine.gradient_bytes * num_parameters
    hidden = last_backwards_s if engine.overlaps_gradients else 0.0
    if placements.state:
        return exposed_s(cluster, ring.gather_s(gradients), hidden) + gather
    return exposed_s(cluster, ring.all_reduce_s(gradients), hidden)


def update_s(cluster: Cluster, engine: Engine, parallel: ParallelConfig, num_parameters: int, num_blocks: int) -> float:
    """Return the seconds of a rank's update of its share of num_parameters.

    With a shared state the host also launches ops for each of num_blocks, on a CPU one after the other.
    """
    replicas = parallel.replicas(parallel.data_parallel_size or 1)
    shares = replicas if ZERO_STAGES[zero_stage(parallel.zero_stage, replicas)].state else 1
    host = 1e-6 * cluster.launch_us * engine.state_ops * num_blocks * (shares > 1)
    update = engine.update_bytes * num_parameters / shares / (1e9 * cluster.memory_gb_per_s)
    return update + host if cluster.device == "cpu" else max(update, host)
