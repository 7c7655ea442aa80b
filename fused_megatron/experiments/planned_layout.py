"""The layout that the planner chooses for a run of an experiment."""

import dataclasses

from fused_megatron.checks import check
from fused_megatron.config import TrainConfig
from fused_megatron.planning.prediction.cluster import load_cluster
from fused_megatron.planning.search.best_layouts import find_best


def planned_config(config: TrainConfig, ranks: int, machine: str, memory_gb: float | None) -> TrainConfig:
    """Return the config with the fastest layout that fits, by `fused-megatron plan`.

    Args:
        config: model and global batch; its own layout does not count.
        ranks: number of ranks.
        machine: name of a shipped cluster.
        memory_gb: memory of a rank in 10^9 bytes, of which tensors may take all; None: the machine's, with what CUDA
            and NCCL hold.

    Raises:
        InputError: no layout fits.
    """
    cluster = load_cluster(machine)
    if memory_gb is not None:  # ranks of this machine: without a CUDA context
        cluster = dataclasses.replace(cluster, device="cpu", memory_gb=memory_gb, gpus_per_node=ranks)
    plans = find_best(config, ranks, cluster).plans
    check(bool(plans), f"no layout of {ranks} ranks fits into {cluster.memory_gb:g} GB: give more ranks or more memory")
    return plans[0].config
