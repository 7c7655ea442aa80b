"""Start here when a sample begins in the wrong document, or an epoch repeats one."""

import numpy as np
import pytest

from fused_megatron.checks import InputError
from fused_megatron.data import compiled_index, sample_index
from fused_megatron.data.sample_index import SampleIndex, index_builders
from fused_megatron.reference import sample_index as reference


def tokens_of(index, sample):
    return [(document, offset + i) for document, offset, taken in index.pieces(sample) for i in range(taken)]


def test_every_epoch_covers_every_token_once():
    rng = np.random.default_rng(0)
    for _ in range(60):
        lengths = rng.integers(0, int(rng.integers(2, 30)), size=int(rng.integers(1, 20)))
        seq_len = int(rng.integers(1, 15))
        if lengths.sum() <= seq_len:
            continue
        index = SampleIndex(lengths, seq_len, seed=int(rng.integers(0, 2**63)))
        total, per_epoch = int(lengths.sum()), index.samples_per_epoch
        assert per_epoch == (total - 1) // seq_len
        for epoch in (0, 1, 7):
            samples = [tokens_of(index, epoch * per_epoch + i) for i in range(per_epoch)]
            assert all(len(s) == seq_len + 1 for s in samples)
            # Every token is once a target (not the first token of a sample) and once an input.
            for part in (slice(1, None), slice(None, -1)):
                seen = [token for s in samples for token in s[part]]
                assert len(set(seen)) == len(seen) == per_epoch * seq_len
            # In order, the samples cover the documents without gaps: each begins where another ends.
            follower = {s[0]: s for s in samples}
            first = next(s for s in samples if s[0] not in {t[-1] for t in samples})
            walk = list(first)
            while walk[-1] in follower:
                walk += follower.pop(walk[-1])[1:]
            order = list(dict.fromkeys(document for document, _ in walk))
            concatenated = [(d, i) for d in order for i in range(lengths[d])]
            assert walk == concatenated[: len(walk)] and total - len(walk) < seq_len


def test_epochs_and_seeds_differ_and_repeat():
    lengths = np.full(50, 20)
    index, again, other = (SampleIndex(lengths, 16, seed) for seed in (3, 3, 4))
    n = index.samples_per_epoch
    epoch = [[tokens_of(index, e * n + i) for i in range(n)] for e in range(3)]
    assert epoch[0] != epoch[1] != epoch[2] != epoch[0]
    assert epoch[0] != [tokens_of(other, i) for i in range(n)]
    # Another object, called in another order, returns the same.
    assert [tokens_of(again, i) for i in reversed(range(3 * n))] == [s for e in epoch for s in e][::-1]


def test_document_longer_than_a_sample_and_far_epochs():
    index = SampleIndex(np.array([0, 1000, 0]), 7, seed=0)
    assert index.samples_per_epoch == 142
    starts = sorted(tokens_of(index, i)[0] for i in range(142))
    assert starts == [(1, 7 * i) for i in range(142)]
    assert len(tokens_of(index, 142 * 10**12 + 5)) == 8


def test_few_epochs_are_kept():
    index = SampleIndex(np.array([10]), 2, seed=0)
    for epoch in range(20):
        list(index.pieces(epoch * index.samples_per_epoch))
    assert len(index._epochs) == 2


@pytest.mark.parametrize(
    "lengths, seq_len, seed, message",
    [
        ([3, 5], 8, 0, "8 tokens are too few for one sample of seq_len=8"),
        ([], 1, 0, "0 tokens are too few"),
        ([0, 0], 1, 0, "0 tokens are too few"),
        ([3, 5], 0, 0, "seq_len=0 must be at least 1"),
        ([3, 5], 2, -1, "seed=-1 must be in"),
        ([3, 5], 2, 2**64, "must be in"),
    ],
)
def test_bad_input(lengths, seq_len, seed, message):
    with pytest.raises(InputError, match=message):
        SampleIndex(np.array(lengths, dtype=np.int64), seq_len, seed)


def test_one_sample_of_all_tokens():
    index = SampleIndex(np.array([3, 5]), 7, seed=0)
    assert index.samples_per_epoch == 1 and len(tokens_of(index, 0)) == 8


def test_without_the_compiled_module_numpy_does_it_with_one_warning(monkeypatch, tmp_path):
    lengths = np.array([5, 0, 9, 31])
    expected = [tokens_of(SampleIndex(lengths, 4, seed=1), i) for i in range(30)]
    monkeypatch.setattr(compiled_index, "LIBRARY", tmp_path / "_dataset_index.so")
    compiled_index.load.cache_clear()
    index_builders.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="compiled dataset index does not load") as warned:
            assert [tokens_of(SampleIndex(lengths, 4, seed=1), i) for i in range(30)] == expected
        assert len(warned) == 1 and sample_index.index_builders() is reference
    finally:
        compiled_index.load.cache_clear()
        index_builders.cache_clear()
