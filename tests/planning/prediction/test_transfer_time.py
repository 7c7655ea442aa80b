"""Start here when the time of a collective or a message is predicted wrongly."""

import dataclasses

import pytest

from fused_megatron.planning.prediction.cluster import load_cluster
from fused_megatron.planning.prediction.transfer_time import Ring

FAST = dataclasses.replace(load_cluster("a100"), node_latency_us=0.0, network_latency_us=0.0)
"""No latencies: times are bytes over bandwidth."""
ONE_GB = 1e9


def test_a_ring_in_a_node_sends_its_share_of_the_bytes():
    ring = Ring(FAST, 4)
    assert ring.gather_s(ONE_GB) == pytest.approx(0.75 / FAST.node_gb_per_s)
    assert ring.all_reduce_s(ONE_GB) == pytest.approx(1.5 / FAST.node_gb_per_s)
    assert ring.message_s(ONE_GB) == pytest.approx(1 / FAST.node_gb_per_s)


@pytest.mark.parametrize(("stride", "in_node"), [(1, 8), (2, 4), (4, 2), (8, 1), (16, 1)])
def test_groups_of_a_node_share_its_adapters(stride, in_node):
    ring = Ring(FAST, 64, stride)
    assert ring.in_node == in_node
    bandwidth = min(FAST.node_gb_per_s, FAST.network_gb_per_s * in_node)
    assert ring.all_reduce_s(ONE_GB) == pytest.approx(2 * 63 / 64 / bandwidth)


def test_messages_leave_the_node_where_neighbours_lie_a_node_apart():
    assert Ring(FAST, 4, 8).message_s(ONE_GB) == pytest.approx(1 / FAST.network_gb_per_s)


def test_latency_counts_hops_of_a_node_and_levels_between_nodes():
    cluster = dataclasses.replace(FAST, node_latency_us=1.0, network_latency_us=100.0)
    assert Ring(cluster, 8).gather_s(1e-9) == pytest.approx(7e-6, rel=1e-6)
    assert Ring(cluster, 32).gather_s(1e-9) == pytest.approx(7e-6 + 200e-6, rel=1e-6)  # four nodes: two levels


def test_one_rank_sends_nothing():
    ring = Ring(FAST, 1)
    assert ring.gather_s(ONE_GB) == ring.all_reduce_s(ONE_GB) == ring.message_s(ONE_GB) == 0
