"""Work of the ranks of a CPU for the messages between stages."""

from fused_megatron.config import TrainConfig
from fused_megatron.models import StageSpan
from fused_megatron.planning.prediction.action_work import ActionWork, Work
from fused_megatron.planning.prediction.cluster import Cluster
from fused_megatron.planning.prediction.engine import Engine
from fused_megatron.planning.rank_communication import message_bytes

_PASSES = 8
"""Passes over memory in which gloo and the kernel copy a message at one end."""


def handled_messages(config: TrainConfig, cluster: Cluster, engine: Engine, span: StageSpan) -> ActionWork:
    """Return what a stage on a CPU does for the messages of a microbatch, with the threads of gloo.

    As if no neighbour were on the same rank, since stages of the same form share their times. A message inside a
    machine takes as long as its copies. While a slower link carries a message, the cores are free.
    """
    ops = 1e-6 * cluster.launch_us * engine.host_message_ops
    copied_gb_per_s = max(cluster.network_gb_per_s, cluster.memory_gb_per_s / _PASSES)
    work = Work(host=ops + message_bytes(config) / (1e9 * copied_gb_per_s))
    messages = (not span.first) + (not span.last)
    return ActionWork(work * messages, work * messages, Work())
