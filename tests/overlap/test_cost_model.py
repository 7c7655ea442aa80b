"""Start here when the cost model cuts products into a wrong number of chunks."""

from fused_megatron.overlap import OverlapCosts
from fused_megatron.overlap.cost_model import Stretch


def choice(product_s, reduce_s, *, latency_s=0.0, rows=1 << 20, weight_s=0.0, slowdown=0.0, **rest):
    costs = OverlapCosts(1e12, latency_s, 1e9, weight_s, slowdown)
    return costs.num_chunks([Stretch(product_s, reduce_s, **rest)], rows, 1)


def test_products_that_read_their_weight_again_bound_it_too():
    assert choice(1.0, 1.0, weight_s=1 / 16) == choice(1.0, 1.0, latency_s=1 / 16) == 6
    assert choice(1.0, 1.0, weight_s=1.0) == 1


def test_free_messages_are_cut_as_finely_as_possible():
    assert choice(1.0, 1.0) == 16
    assert choice(1.0, 0.0, gather_s=1.0) == 16
    assert choice(1.0, 1.0, rows=1000) == 8  # 64 rows in the shortest chunk at least
    assert choice(1.0, 1.0, rows=127) == 1


def test_messages_that_cost_bound_the_number_of_chunks():
    assert [choice(1.0, 1.0, latency_s=latency_s) for latency_s in (1 / 64, 1 / 16, 1 / 8, 1.0)] == [12, 6, 3, 1]


def test_the_time_of_a_step():
    costs = OverlapCosts(1e12, 0.0, 1e9)
    parts = [1 / 4, 1 / 2, 1 / 4]
    # The second transfer waits for the second product: 3/4 + 1/2 + 1/4. A gather arrives with the next one.
    assert costs._stretch_s(Stretch(1.0, 1.0), parts, 0.0) == 1.5
    assert costs._stretch_s(Stretch(1.0, gather_s=1.0), parts, 0.0) == 1.75
    assert costs._stretch_s(Stretch(1.0, 1.0), [1.0], 0.0) == 2.0
    assert costs._stretch_s(Stretch(1.0, 1.0, after_s=1.0), [1.0], 0.0) == 2.0
    # The first product waits for nothing, but without chunks it is part of the whole, which waits for the gather.
    assert costs._stretch_s(Stretch(1.0, gather_s=1.0, before_s=1.0), parts, 0.0) == 2.0
    assert costs._stretch_s(Stretch(1.0, gather_s=1.0, before_s=1.0), [1.0], 0.0) == 3.0
    assert costs._stretch_s(Stretch(1.0, 1.0), parts, 0.25) == 2.0  # the products take 1.75, then the last transfer
    half = OverlapCosts(1e12, 0.0, 1e9, slowdown=0.5)
    assert half._stretch_s(Stretch(1.0, 1.0, after_s=1.0), [1.0], 0.0) == 2.5


def test_little_gain_is_none():
    assert choice(1.0, 0.02) == 1  # at most 2% could be hidden
    assert choice(0.02, 1.0) == 1
    assert choice(1.0, 0.1) > 1


def test_transfers_that_take_the_same_cores_are_not_cut():
    assert choice(1.0, 1.0, slowdown=1.0) == 1
    assert choice(1.0, 1.0, slowdown=0.5) > 1


def test_what_a_second_product_hides_needs_no_chunks():
    assert choice(1.0, 0.9, after_s=1.0) == 1
    assert choice(1.0, 2.0, after_s=1.0) > 1
