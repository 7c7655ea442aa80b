"""Start here when batches differ between layouts, or after a resume."""

import numpy as np
import pytest

from fused_megatron.checks import InputError
from fused_megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from fused_megatron.data.token_dataset import (
    TokenDataset,
    ValidationDataset,
    all_documents,
    check_tokens,
    held_out,
    inputs_and_targets,
    split_documents,
)


@pytest.fixture
def dataset(tmp_path):
    """A dataset whose tokens equal their positions; some documents are empty, some have two sequences."""
    lengths = np.random.default_rng(0).integers(0, 40, size=60)
    lengths[[0, 7, 59]] = 0
    return make(tmp_path / "data", lengths)


def make(prefix, lengths, offset=0):
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for i, length in enumerate(lengths):
            half = int(length) // 2
            parts = [half, int(length) - half] if i % 3 == 0 else None
            writer.add_document(np.arange(offset, offset + length), sequence_lengths=parts)
            offset += int(length)
    return IndexedDataset(prefix)


def test_sample_is_what_the_index_says(dataset):
    tokens = TokenDataset(dataset, 16, seed=1)
    for i in (0, 5, tokens.samples_per_epoch, 10**9):
        expected = [
            int(dataset.document_offsets()[document]) + offset + j
            for document, offset, taken in tokens.index.pieces(i)
            for j in range(taken)
        ]
        sample = tokens.sample(i)
        assert sample.tolist() == expected and sample.shape == (17,) and sample.dtype == np.int64


def test_data_parallel_ranks_divide_one_global_batch(dataset):
    tokens = TokenDataset(dataset, 16, seed=1)
    for step in (0, 3, tokens.samples_per_epoch):
        whole = tokens.batch(step, 12)
        assert whole.shape == (12, 17)
        assert np.array_equal(whole, np.stack([tokens.sample(12 * step + i) for i in range(12)]))
        for dp_size in (2, 3, 4, 12):
            parts = [TokenDataset(dataset, 16, seed=1).batch(step, 12, r, dp_size) for r in range(dp_size)]
            assert np.array_equal(np.concatenate(parts), whole)
    # Ranks are disjoint: over one epoch, no two ranks see the same target.
    steps = tokens.samples_per_epoch // 4
    seen = [{int(t) for step in range(steps) for t in tokens.batch(step, 4, rank, 2)[:, 1:].flat} for rank in range(2)]
    assert not seen[0] & seen[1] and len(seen[0]) == len(seen[1]) == steps * 2 * 16


def test_batches_are_a_function_of_samples_consumed(dataset):
    tokens = TokenDataset(dataset, 16, seed=1)
    expected = np.concatenate([tokens.batch(step, 4) for step in range(30)])
    # A new object resumes in the middle with another batch size.
    resumed = TokenDataset(dataset, 16, seed=1)
    assert np.array_equal(np.concatenate([resumed.batch(step, 6) for step in range(10, 20)]), expected[60:])
    assert np.array_equal(resumed.rows(33, 5), expected[33:38])


def test_bad_batches(dataset):
    tokens = TokenDataset(dataset, 16, seed=1)
    with pytest.raises(InputError, match=r"global_batch_size=6 must be divisible by data_parallel_size=4 .*4, 8"):
        tokens.batch(0, 6, 0, 4)
    with pytest.raises(InputError, match=r"dp_rank=2 must be in \[0, dp_size=2\)"):
        tokens.batch(0, 6, 2, 2)
    with pytest.raises(InputError, match="global_batch_size=0 must be at least 1"):
        tokens.batch(0, 0)
    with pytest.raises(InputError, match="sample index -1 must not be negative"):
        tokens.sample(-1)
    with pytest.raises(InputError, match=r"data: \d+ tokens are too few for one sample of seq_len=5000"):
        TokenDataset(dataset, 5000, seed=1)


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 1000])
@pytest.mark.parametrize("dp_size", [1, 2])
def test_validation_covers_every_token_once(dataset, seq_len, dp_size):
    tokens = ValidationDataset(dataset, seq_len)
    batches = [
        np.concatenate([tokens.batch(i, 4, rank, dp_size) for rank in range(dp_size)])
        for i in range(tokens.num_batches(4))
    ]
    rows = np.concatenate(batches)
    assert rows.shape == (4 * tokens.num_batches(4), seq_len + 1) and rows.dtype == np.int64
    inputs, targets = inputs_and_targets(rows)
    real = targets != -100
    assert targets[real].tolist() == list(range(1, dataset.total_tokens))  # tokens equal their positions
    assert np.array_equal(inputs[real], targets[real] - 1)
    assert (inputs >= 0).all()
    assert tokens.num_samples == -(-(dataset.total_tokens - 1) // seq_len)
    assert (real.any(axis=1)).sum() == tokens.num_samples and real[: tokens.num_samples].any(axis=1).all()
    # Real targets come first in a row, so no real token attends to padding.
    assert (np.diff(real.astype(int), axis=1) <= 0).all()


def test_validation_without_and_with_a_tail(tmp_path):
    exact = ValidationDataset(make(tmp_path / "a", [5, 4]), 4)  # 8 targets: two full samples
    assert exact.num_samples == 2 and (exact.batch(0, 2) >= 0).all()
    one_more = ValidationDataset(make(tmp_path / "b", [5, 5]), 4)
    assert one_more.num_samples == 3
    assert one_more.batch(0, 4).tolist()[2:] == [[8, 9, -100, -100, -100], [-100] * 5]
    with pytest.raises(InputError, match="1 held-out tokens are too few"):
        ValidationDataset(make(tmp_path / "c", [1]), 4)
    with pytest.raises(InputError, match="0 held-out tokens are too few"):
        ValidationDataset(make(tmp_path / "d", []), 4)


def test_validation_of_some_samples(dataset):
    every = ValidationDataset(dataset, 16)
    some = ValidationDataset(dataset, 16, max_samples=5)
    assert some.num_samples == 5 and some.num_batches(2) == 3
    rows = every.batch(0, every.num_samples)
    expected = [rows[i * every.num_samples // 5].tolist() for i in range(5)]
    assert some.batch(0, 5).tolist() == expected
    assert ValidationDataset(dataset, 16, max_samples=10**6).num_samples == every.num_samples


@pytest.mark.parametrize("fraction", [0.05, 0.1, 1 / 3, 0.5])
def test_split_by_documents(dataset, fraction):
    train, validation = split_documents(dataset, fraction)
    every = all_documents(dataset)
    assert len(validation.lengths) == int(60 * fraction)
    both = np.concatenate([train.starts, validation.starts]), np.concatenate([train.lengths, validation.lengths])
    assert sorted(zip(*both, strict=True)) == sorted(zip(every.starts, every.lengths, strict=True))
    # Evenly spread: the gaps between held-out documents differ by one at most.
    chosen = np.flatnonzero([held_out(i, fraction) for i in range(60)])
    assert np.array_equal(every.lengths[chosen], validation.lengths)
    assert np.ptp(np.diff(chosen)) <= 1


@pytest.mark.parametrize("lengths", [[100], [100, 0, 40], [1000] * 19])
def test_split_of_few_documents(tmp_path, lengths):
    dataset = make(tmp_path / "data", lengths)
    train, validation = split_documents(dataset, 0.05)
    assert validation.lengths.tolist() == [int(n * 0.05) for n in lengths]
    for i, start in enumerate(dataset.document_offsets()[:-1]):
        assert train.starts[i] == start and train.starts[i] + train.lengths[i] == validation.starts[i]
        assert train.lengths[i] + validation.lengths[i] == lengths[i]
    part = TokenDataset(dataset, 10, seed=0, documents=train)
    seen = {int(t) for i in range(part.samples_per_epoch * 3) for t in part.sample(i)}
    held = ValidationDataset(dataset, 3, documents=validation)
    assert not seen & set(held.batch(0, held.num_samples).flat)


def test_token_beyond_the_vocabulary_is_named(tmp_path):
    dataset = make(tmp_path / "data", [0, 30, 0, 30, 30], offset=100)
    TokenDataset(dataset, 8, seed=0, vocab_size=190).rows(0, 100)
    TokenDataset(dataset, 8, seed=0).rows(0, 100)
    with pytest.raises(InputError) as caught:
        TokenDataset(dataset, 8, seed=0, vocab_size=140).rows(0, 100)
    text = str(caught.value)
    index = int(text.split("sample ")[1].split(":")[0])
    token = int(text.split("token id ")[1].split()[0])
    document = int(text.split("document ")[1].split(",")[0])
    assert token in TokenDataset(dataset, 8, seed=0).sample(index) and token >= 140
    assert token - 100 in range(*dataset.document_offsets()[document : document + 2])
    assert f"{tmp_path}/data.bin" in text and "vocab_size=140" in text and "\n" not in text
    held = ValidationDataset(dataset, 11, vocab_size=189)  # the last token is 189, in the last of 9 samples
    for i in range(8):
        held.batch(i, 1)
    with pytest.raises(InputError, match=r"document 4, validation sample 8: token id 189 at row 0, column 1"):
        held.batch(8, 1)


@pytest.mark.parametrize("bad", [8, -1, 2**62, -(2**63)])
def test_check_tokens(bad):
    batch = np.array([[0, 7, 3], [1, 2, 3]])
    check_tokens(batch, 8)
    check_tokens(batch[:, ::2], 8)
    check_tokens(np.empty((0, 5), dtype=np.int64), 8)
    batch[1, 1] = bad
    with pytest.raises(InputError, match=rf"batch: token id {bad} at row 1, column 1 is not in \[0, vocab_size=8\)"):
        check_tokens(batch, 8)
