"""Start here when a tile shows a query a key that it must not see, or a balanced partition counts wrong work."""

import itertools
import random

import numpy as np
import pytest

from fused_megatron.ops.visible_pairs import Visibility


def dense(causal, window, starts, seq_len):
    """Return [B, S, S] bool, pair by pair, as the docstring of AttentionMask says."""
    seen = np.zeros((len(starts), seq_len, seq_len), dtype=bool)
    for sample, own in enumerate(starts):
        document = [max(start for start in own if start <= position) for position in range(seq_len)]
        for query in range(seq_len):
            for key in range(seq_len):
                hidden = (causal and key > query) or (window is not None and key <= query - window)
                seen[sample, query, key] = not hidden and document[query] == document[key]
    return seen


def drawn(seed):
    """Draw a visibility, and ranges of queries and keys in any order, with a part in common."""
    draw = random.Random(seed)
    seq_len = draw.randint(1, 24)
    causal = draw.random() < 0.7
    window = draw.randint(1, 30) if causal and draw.random() < 0.5 else None
    starts = tuple(
        tuple(sorted({0, *draw.sample(range(seq_len), draw.randint(0, min(seq_len, 4)))}))
        for _ in range(draw.randint(1, 3))
    )
    cuts = sorted({0, seq_len, *draw.sample(range(seq_len + 1), min(seq_len + 1, 6))})
    ranges = list(itertools.pairwise(cuts))
    draw.shuffle(ranges)
    count = draw.randint(0, len(ranges))
    return Visibility(causal, window, starts, seq_len), ranges[:count], ranges[len(ranges) // 2 :]


@pytest.mark.parametrize("part", range(4))
def test_tiles_hold_every_visible_pair_once(part):
    for seed in range(25 * part, 25 * part + 25):
        visibility, queries, keys = drawn(seed)
        wanted = dense(visibility.causal, visibility.window, visibility.starts, visibility.seq_len)
        assert (visibility.pairs_of_positions() == wanted.sum((0, 2))).all()
        at_queries = [position for start, stop in queries for position in range(start, stop)]
        at_keys = [position for start, stop in keys for position in range(start, stop)]
        found = np.zeros((len(visibility.starts), len(at_queries), len(at_keys)), dtype=int)
        for tile in visibility.tiles(queries, keys):
            seen = pairs_of(tile)
            assert seen.any(0).all() and seen.any(1).all()
            assert tile.num_pairs == seen.sum() * tile.num_samples
            assert at_queries[tile.queries[0]] == tile.query_position and at_keys[tile.keys[0]] == tile.key_position
            found[slice(*tile.samples), slice(*tile.queries), slice(*tile.keys)] += seen
        assert (found == wanted[:, at_queries][:, :, at_keys]).all()


def pairs_of(tile):
    query, key = np.arange(tile.num_queries)[:, None], np.arange(tile.num_keys)[None]
    return (key <= query + (10**9 if tile.upper is None else tile.upper)) & (
        key >= query + (-(10**9) if tile.lower is None else tile.lower)
    )


def test_a_part_of_a_tile_shows_the_same_pairs():
    for seed in range(60):
        visibility, queries, keys = drawn(seed)
        for tile in visibility.tiles(queries, keys):
            draw = random.Random(seed)
            rows = sorted(draw.choices(range(tile.num_queries), k=2))
            columns = sorted(draw.choices(range(tile.num_keys), k=2))
            part = tile.part(*rows, *columns)
            wanted = pairs_of(tile)[rows[0] : rows[1] + 1, columns[0] : columns[1] + 1]
            assert (pairs_of(part) == wanted).all()


def test_samples_with_the_same_documents_share_their_tiles():
    visibility = Visibility.of_documents(True, None, [0, 3, 8, 11, 16, 24], 3, 8)
    assert visibility.starts == ((0, 3), (0, 3), (0,))
    assert [tile.samples for tile in visibility.tiles([(0, 8)], [(0, 8)])] == [(0, 2), (0, 2), (2, 3)]


def test_a_document_does_not_reach_into_the_next_row():
    assert Visibility.of_documents(True, None, [0, 12, 16], 2, 8).starts == ((0,), (0, 4))
