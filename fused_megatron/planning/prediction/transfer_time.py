"""Times of collectives and messages on a cluster."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil, log2

from fused_megatron.planning.prediction.cluster import Cluster


@dataclass(frozen=True)
class Ring:
    """Links between the ranks of a group.

    A group has `size` ranks that lie `stride` ranks apart. The ranks of a node are neighbours, so a group reaches
    beyond its node if size x stride is larger than a node. Then each of the `stride` groups of a node gets its part of
    the node's network adapters.
    """

    cluster: Cluster
    size: int
    stride: int = 1

    @cached_property
    def in_node(self) -> int:
        """Ranks of the group in one node."""
        return max(1, min(self.size, self.cluster.gpus_per_node // self.stride))

    @cached_property
    def leaves_node(self) -> bool:
        return self.size > self.in_node and self.cluster.device == "cuda"

    @cached_property
    def copies(self) -> bool:
        """Whether the ranks of one machine copy themselves, through memory that they share (host_ring.py)."""
        return self.cluster.device == "cpu" and not self.cluster.transfer_overlap

    @cached_property
    def gb_per_s(self) -> float:
        """Bus bandwidth of a rank: of the slowest link of a ring."""
        if not self.leaves_node:
            return self.cluster.node_gb_per_s
        return min(self.cluster.node_gb_per_s, self.cluster.network_gb_per_s * self.in_node)

    @cached_property
    def latency_s(self) -> float:
        """Time of a collective beyond its bytes: along a ring in a node, along a tree between nodes."""
        nodes = ceil(self.size / self.in_node)
        in_node = self.cluster.node_latency_us * (self.in_node - 1)
        between = self.cluster.network_latency_us * ceil(log2(nodes)) if self.leaves_node else 0.0
        return 1e-6 * (in_node + between)

    def gather_s(self, num_bytes: float) -> float:
        """Return the seconds of an all-gather or a reduce-scatter whose full tensor has num_bytes."""
        if self.size == 1 or not num_bytes:
            return 0.0
        share = (self.size - 1) / self.size
        if self.copies:
            # Copies of 2 + 2 / R and 2 + 3 (R - 1) / R bytes, read or written, for each of the tensor: their mean.
            share = (7 - 1 / self.size) / 2
        return self.latency_s + share * num_bytes / (1e9 * self.gb_per_s)

    def all_reduce_s(self, num_bytes: float) -> float:
        """Return the seconds of an all-reduce of num_bytes: a reduce-scatter and an all-gather."""
        if self.size == 1 or not num_bytes:
            return 0.0
        share = 2 * (self.size - 1) / self.size
        if self.copies:
            share = 3 * self.size - 1  # a rank writes its tensor for all, and adds the tensors of all
        return self.latency_s + share * num_bytes / (1e9 * self.gb_per_s)

    def exchange_s(self, num_bytes: float) -> float:
        """Return the seconds of an all-to-all in which a rank sends num_bytes, in equal parts, to all other ranks.

        A rank sends what leaves the node through its own network adapter, beside what stays in the node.
        """
        if self.size == 1 or not num_bytes:
            return 0.0
        if self.copies:
            return self.latency_s + 4 * num_bytes / (1e9 * self.gb_per_s)
        leaving = (self.size - self.in_node) / (self.size - 1) if self.leaves_node else 0.0
        in_node = (1 - leaving) * num_bytes / (1e9 * self.cluster.node_gb_per_s)
        return self.latency_s + max(in_node, leaving * num_bytes / (1e9 * self.cluster.network_gb_per_s))

    def message_s(self, num_bytes: float) -> float:
        """Return the seconds of a message of num_bytes to the next rank of the group."""
        if self.size == 1 or not num_bytes:
            return 0.0
        if self.in_node > 1 and self.cluster.device == "cuda":
            return 1e-6 * self.cluster.node_latency_us + num_bytes / (1e9 * self.cluster.node_gb_per_s)
        return 1e-6 * self.cluster.network_latency_us + num_bytes / (1e9 * self.cluster.network_gb_per_s)


@lru_cache(maxsize=4096)
def ring_of(cluster: Cluster, size: int, stride: int = 1) -> Ring:
    """Return a ring whose speeds are computed once: a search asks for the same few rings very often."""
    return Ring(cluster, size, stride)
