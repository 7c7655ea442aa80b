"""Start here when a context-parallel rank has more attention work, or more tokens, than the others."""

from itertools import chain

import numpy as np
import pytest

from fused_megatron.checks import InputError
from fused_megatron.sharding import SequenceLayout, SequencePartition, balanced_partition


def counted_work(lengths_of_samples, causal, window):
    """Count the keys that each position sees, one document after the other; a sum over the samples, [S]."""
    total = 0
    for lengths in lengths_of_samples:
        seen = [np.arange(1, n + 1) if causal else np.full(n, n) for n in lengths]
        total = total + np.minimum(np.concatenate(seen), window or sum(lengths))
    return total


def positions(layout):
    return [position for start, stop in layout.ranges for position in range(start, stop)]


def random_documents(rng, batch, seq_len, longest):
    """Draw the lengths of the documents of each sample: single tokens, and up to `longest` tokens."""
    samples = []
    for _ in range(batch):
        lengths = []
        while sum(lengths) < seq_len:
            length = 1 if rng.random() < 0.3 else int(rng.integers(1, longest + 1))
            lengths.append(min(length, seq_len - sum(lengths)))
        samples.append(lengths)
    return samples


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_one_causal_document_is_cut_into_the_zigzag(ranks):
    seq_len = 2 * ranks * 48
    partition = balanced_partition(counted_work([[seq_len]], True, None), ranks)
    zigzag = [SequenceLayout.zigzag(seq_len, rank, ranks) for rank in range(ranks)]
    assert [positions(layout) for layout in partition.layouts] == [positions(layout) for layout in zigzag]
    assert partition.sizes == (seq_len // ranks,) * ranks and partition.seq_len == seq_len


@pytest.mark.parametrize("seed", range(20))
def test_work_and_tokens_are_even_for_any_documents(seed):
    rng = np.random.default_rng(seed)
    batch = int(rng.integers(1, 4))
    seq_len = int(rng.integers(8192 // batch + 1, 12000))
    longest = int(rng.choice([40, 4000, seq_len]))
    window = None if seed % 2 else int(rng.integers(1, 2 * seq_len))
    work = counted_work(random_documents(rng, batch, seq_len, longest), window is not None or seed % 3 > 0, window)
    for ranks in range(2, 9):
        partition = balanced_partition(work, ranks)
        assert sorted(chain.from_iterable(map(positions, partition.layouts))) == list(range(seq_len))
        loads = [int(work[positions(layout)].sum()) for layout in partition.layouts]
        assert partition.work(work) == loads and max(loads) * ranks <= 1.02 * sum(loads)
        assert max(partition.sizes) - min(partition.sizes) <= 1
        assert max(len(layout.ranges) for layout in partition.layouts) <= ranks


@pytest.mark.parametrize(("lengths", "window"), [([9000], 64), ([50] * 180, None)])
def test_windows_and_short_documents_keep_the_positions_of_a_rank_together(lengths, window):
    partition = balanced_partition(counted_work([lengths], True, window), 4)
    assert partition == SequencePartition.contiguous(9000, 4)


def test_sizes_follow_from_the_length_and_are_multiples_for_sequence_parallel_ranks():
    rng = np.random.default_rng(0)
    for work in (rng.integers(0, 1000, 8004), np.arange(8004)):
        partition = balanced_partition(work, 3, multiple_of=4)
        assert partition.sizes == SequencePartition.contiguous(8004, 3, 4).sizes == (2668,) * 3
        assert balanced_partition(work, 7, multiple_of=4).sizes == (1144,) * 6 + (1140,)
    assert balanced_partition(np.zeros(10, dtype=np.int64), 3).sizes == (4, 3, 3)


def test_neighbouring_ranks_share_the_rows_of_a_group():
    groups = SequencePartition((SequenceLayout(11, ((0, 3), (8, 11))), SequenceLayout(11, ((3, 8),))))
    ranks = groups.blocks(2)
    assert [layout.ranges for layout in ranks.layouts] == [((0, 3),), ((8, 11),), ((3, 6),), ((6, 8),)]
    assert ranks.num_ranks == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: balanced_partition(np.arange(3), 4), "seq_len=3 on 4 context-parallel ranks leaves a rank without"),
        (lambda: SequencePartition.contiguous(16, 5, 4), "use at most 4 ranks"),
        (lambda: SequencePartition.contiguous(10, 2, 4), "seq_len=10 must be divisible by multiple_of=4"),
        (lambda: SequencePartition(()), "must have a layout for each rank"),
        (lambda: SequencePartition((SequenceLayout(4, ((0, 2),)), SequenceLayout(4, ((1, 4),)))), "position 1 is held"),
        (lambda: SequencePartition((SequenceLayout(4, ((0, 2),)), SequenceLayout(4, ((3, 4),)))), "position 2 is held"),
        (lambda: SequencePartition((SequenceLayout(4, ((0, 3),)),)), r"all seq_len=\[4\] positions, but they hold 3"),
    ],
)
def test_partitions_that_cannot_be(make, message):
    with pytest.raises(InputError, match=message):
        make()
