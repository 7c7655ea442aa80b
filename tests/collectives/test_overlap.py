import itertools

import pytest

from fused_megatron.checks import InputError
from fused_megatron.collectives import AUTO, ChunkChoice, OverlapCosts, chunk_choice
from fused_megatron.collectives.chunked_products import chunk_edges


def choice(product_s, transfer_s, *, latency_s=0.0, hidden_products=1, rows=1 << 20, weight_s=0.0):
    costs = OverlapCosts(1e12, latency_s, 1e9, weight_s)
    return costs.num_chunks(product_s, transfer_s, (hidden_products,), rows, 1)


def test_products_that_read_their_weight_again_bound_it_too():
    # c chunks take 1 + c w + 1 / c: as with messages that cost.
    assert choice(1.0, 1.0, weight_s=1 / 16) == 4
    assert choice(1.0, 1.0, weight_s=1.0) == 1


def test_free_messages_are_cut_as_finely_as_possible():
    assert choice(1.0, 1.0) == 16
    assert choice(1.0, 1.0, rows=300) == 4  # 64 rows a chunk at least


def test_messages_that_cost_bound_the_number_of_chunks():
    # c chunks take 1 / c + c l + 1: the best c is 1 / sqrt(l).
    assert choice(1.0, 1.0, latency_s=1 / 16) == 4
    assert choice(1.0, 1.0, latency_s=1.0) == 1


def test_little_gain_is_none():
    assert choice(1.0, 0.02) == 1  # at most 2% could be hidden
    assert choice(0.02, 1.0) == 1
    assert choice(1.0, 0.1) > 1


def test_what_a_second_product_hides_needs_no_chunks():
    assert choice(1.0, 0.9, hidden_products=2) == 1
    assert choice(1.0, 2.0, hidden_products=2) > 1


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
    lengths = [end - begin for begin, end in edges]
    assert max(lengths) - min(lengths[:-1], default=max(lengths)) <= multiple
