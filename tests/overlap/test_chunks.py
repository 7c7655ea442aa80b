"""Start here when the edges of chunks are wrong."""

import itertools

import pytest

from fused_megatron.overlap.chunks import chunk_edges, chunk_parts


def test_the_ends_are_short():
    assert chunk_parts(1) == [1.0] and chunk_parts(4) == [0.2, 0.3, 0.3, 0.2]
    assert chunk_parts(8)[0] == chunk_parts(8)[-1] == 1 / 14


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
