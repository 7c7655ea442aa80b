"""Start here when an overlapped product is cut into too many or too few chunks."""

import itertools

import pytest

from fused_megatron.checks import InputError
from fused_megatron.overlap import AUTO, ChunkChoice, OverlapCosts, chunk_choice
from fused_megatron.overlap.chunked_products import chunk_edges
from fused_megatron.overlap.cost_model import Stretch, chunk_parts


def choice(product_s, reduce_s, *, latency_s=0.0, rows=1 << 20, weight_s=0.0, slowdown=0.0, **rest):
    costs = OverlapCosts(1e12, latency_s, 1e9, weight_s, slowdown)
    return costs.num_chunks([Stretch(product_s, reduce_s, **rest)], rows, 1)


def test_the_ends_are_short():
    assert chunk_parts(1) == [1.0] and chunk_parts(4) == [0.2, 0.3, 0.3, 0.2]
    assert chunk_parts(8)[0] == chunk_parts(8)[-1] == 1 / 14


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


def test_the_step_that_the_model_plays():
    costs = OverlapCosts(1e12, 0.0, 1e9)
    parts = [1 / 4, 1 / 2, 1 / 4]
    # The second transfer waits for the second product: 3/4 + 1/2 + 1/4. A gather is there with the next one.
    assert costs._stretch_s(Stretch(1.0, 1.0), parts, 0.0) == 1.5
    assert costs._stretch_s(Stretch(1.0, gather_s=1.0), parts, 0.0) == 1.75
    assert costs._stretch_s(Stretch(1.0, 1.0), [1.0], 0.0) == 2.0
    assert costs._stretch_s(Stretch(1.0, 1.0, after_s=1.0), [1.0], 0.0) == 2.0
    assert costs._stretch_s(Stretch(1.0, gather_s=1.0, before_s=1.0), [1.0], 0.0) == 2.0
    assert costs._stretch_s(Stretch(1.0, 1.0), parts, 0.25) == 2.0  # the products take 1.75, then the last transfer
    half = OverlapCosts(1e12, 0.0, 1e9, slowdown=0.5)
    assert half._stretch_s(Stretch(1.0, 1.0, after_s=1.0), [1.0], 0.0) == 2.5


def test_little_gain_is_none():
    assert choice(1.0, 0.02) == 1  # at most 2% could be hidden
    assert choice(0.02, 1.0) == 1
    assert choice(1.0, 0.1) > 1


def test_transfers_that_are_all_work_for_the_same_cores_are_not_cut():
    assert choice(1.0, 1.0, slowdown=1.0) == 1
    assert choice(1.0, 1.0, slowdown=0.5) > 1


def test_what_a_second_product_hides_needs_no_chunks():
    assert choice(1.0, 0.9, after_s=1.0) == 1
    assert choice(1.0, 2.0, after_s=1.0) > 1


def test_what_users_pass():
    assert chunk_choice(True) == AUTO and chunk_choice(False) == ChunkChoice(1) and chunk_choice(3) == ChunkChoice(3)
    with pytest.raises(InputError, match="overlap=0 must be at least 1 chunk"):
        chunk_choice(0)


@pytest.mark.parametrize("length", [0, 1, 5, 12, 128, 1000])
@pytest.mark.parametrize("num_chunks", [1, 2, 3, 16])
@pytest.mark.parametrize("multiple", [1, 4, 128])
def test_edges(length, num_chunks, multiple):
    edges = chunk_edges(length, num_chunks, multiple)
    assert 1 <= len(edges) <= num_chunks
    assert edges[0][0] == 0 and edges[-1][1] == length
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(edges))
    assert all(begin % multiple == 0 for begin, _ in edges)
    assert length == 0 or all(begin < end for begin, end in edges)
    if length >= multiple * num_chunks:
        assert len(edges) == num_chunks
    # In units of `multiple`, one for each chunk and the rest by chunk_parts.
    units = -(-length // multiple)
    for (begin, end), part in zip(edges, chunk_parts(len(edges)), strict=True):
        assert abs((end - begin) / multiple - 1 - (units - len(edges)) * part) <= 2 or length == 0
