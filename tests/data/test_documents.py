"""Start here when a packed sample has the wrong documents, positions or targets, or a step the wrong divisor."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.config import BERTConfig, DataConfig, GPTConfig, TrainConfig, TrainingConfig
from fused_megatron.data.batch import Batch
from fused_megatron.data.documents import cumulative_lengths, positions_in_documents
from fused_megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from fused_megatron.data.token_dataset import TokenDataset, ValidationDataset
from fused_megatron.data.training_data import TrainingData, open_training_data
from fused_megatron.sharding import SequenceLayout

SEQ_LEN = 16


def starts_of(rows: list[list[int]]) -> torch.Tensor:
    """Return where documents of these lengths start, [B, S] bool."""
    return torch.tensor([[i == 0 for length in row for i in range(length)] for row in rows])


def test_cumulative_lengths_and_positions() -> None:
    starts = starts_of([[4], [1, 1, 1, 1], [1, 3]])
    assert cumulative_lengths(starts).tolist() == [0, 4, 5, 6, 7, 8, 9, 12]
    assert positions_in_documents(starts).tolist() == [[0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 1, 2]]
    assert cumulative_lengths(starts).dtype == positions_in_documents(starts).dtype == torch.int64


def dataset_of(prefix: Path, lengths: list[int]) -> IndexedDataset:
    """Write documents whose tokens are 1000 x document + offset."""
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for i, length in enumerate(lengths):
            writer.add_document(1000 * i + np.arange(length))
    return IndexedDataset(prefix)


@pytest.mark.parametrize(
    "lengths",
    [[5, 40, 1, 0, 0, 7, 1, 1, 23, 0, 2, 60, 3], [200], [1] * 90, [0, 17, 16, 33, 48]],
    ids=["mixed", "one document", "single tokens", "multiples of the sample"],
)
def test_documents_of_samples_are_seen_in_their_tokens(tmp_path: Path, lengths: list[int]) -> None:
    dataset = dataset_of(tmp_path / "data", lengths)
    training = TokenDataset(dataset, SEQ_LEN, seed=3)
    for first, count in ((0, 3), (training.samples_per_epoch - 1, 7), (1000, 1)):
        rows, starts = training.rows(first, count), training.document_starts(first, count)
        expected = np.ones_like(starts)
        expected[:, 1:] = rows[:, 1:] // 1000 != rows[:, :-1] // 1000
        assert np.array_equal(starts, expected)
        # Counted from the index, without a token and over the ends of epochs.
        assert training.num_document_starts(first, count) == expected[:, 1:].sum()
    validation = ValidationDataset(dataset, SEQ_LEN)
    rows, starts = validation.batch(0, 32), validation.document_starts(0, 32)
    real = rows[:, 1:] >= 0
    assert np.array_equal(starts[:, 1:], real & (rows[:, 1:] // 1000 != rows[:, :-1] // 1000)) and starts[:, 0].all()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "pages.jsonl"
    pages = [" ".join(f"{i * j % 13}" for j in range(i % 7)) or "x" for i in range(200)]
    path.write_text("\n".join(json.dumps({"text": page}) for page in pages))
    return path


def opened(text: Path, **changes: bool | None) -> TrainingData:
    data = DataConfig(path=str(text), cache_folder=str(text.parent / "cache"), tokenizer_vocab_size=280, **changes)
    training = TrainingConfig(global_batch_size=8, microbatch_size=2)
    model = GPTConfig(num_layers=1, hidden_size=16, num_heads=2, seq_len=SEQ_LEN)
    return open_training_data(TrainConfig(model, data=data, training=training), lambda *progress: None)


def test_batches_of_masked_documents(text: Path) -> None:
    plain, data = opened(text), opened(text, mask_documents=True)
    assert plain.tokenizer is not None
    end = plain.tokenizer.end_of_document
    for i in range(plain.training.samples_per_epoch // 8 + 2):  # beyond the end of an epoch
        before, batch = plain.training_batch(8 * i, 8, 0, 1), data.training_batch(8 * i, 8, 0, 1)
        assert torch.equal(before.inputs, batch.inputs)
        assert before.document_starts is before.positions is None
        assert batch.document_starts is not None and batch.positions is not None
        # Each text ends with a token that is in no text: the next token starts a document and is no target.
        ends = batch.inputs == end
        assert torch.equal(batch.document_starts[:, 1:], ends[:, :-1])
        assert torch.equal(batch.targets, before.targets.masked_fill(ends, -100))
        assert data.num_targets(8 * i, 8) == (batch.targets >= 0).sum() < plain.num_targets(8 * i, 8) == 8 * SEQ_LEN
        halves = [data.training_batch(8 * i, 8, rank, 2) for rank in (0, 1)]
        for name in ("targets", "document_starts", "positions"):
            assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(batch, name))
    held, masked = plain.validation_batch(0, 8, 0, 1), data.validation_batch(0, 8, 0, 1)
    padding = held.targets < 0
    assert torch.equal(masked.targets, held.targets.masked_fill((held.inputs == end) & ~padding, -100))
    assert opened(text, mask_documents=True, reset_positions=False).training_batch(0, 8, 0, 1).positions is None


def test_microbatches_and_positions_of_a_rank() -> None:
    starts = starts_of([[4], [1, 1, 1, 1], [1, 3], [2, 2]])
    tokens = torch.arange(16).view(4, 4)
    batch = Batch(tokens, tokens, document_starts=starts, positions=positions_in_documents(starts))
    inputs, _, keywords = batch.microbatches(2, torch.device("cpu"))
    assert [x.tolist() for x in inputs] == [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11], [12, 13, 14, 15]]]
    assert [one["documents"].tolist() for one in keywords] == [[0, 4, 5, 6, 7, 8], [0, 1, 4, 6, 8]]
    assert keywords[1]["positions"].tolist() == [[0, 0, 1, 2], [0, 1, 0, 1]]
    first, second = batch.split(2)
    assert second.key_padding_mask is None and second.positions is not None
    assert second.microbatches(2, torch.device("cpu"))[2][0]["documents"].tolist() == [0, 1, 4, 6, 8]
    # A rank has some positions of the sequence; the documents are those of the whole sequence.
    part = first.take(SequenceLayout(4, ((0, 1), (3, 4))))
    (inputs,), _, (keyword,) = part.microbatches(2, torch.device("cpu"))
    assert inputs.tolist() == [[0, 3], [4, 7]] and keyword["positions"].tolist() == [[0, 3], [0, 0]]
    assert keyword["documents"].tolist() == [0, 4, 5, 6, 7, 8]


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reset_positions=True needs mask_documents=True"):
        DataConfig(reset_positions=True)
    with pytest.raises(InputError, match=r"mask_documents=True must be false for model.family='bert'"):
        TrainConfig(BERTConfig(), data=DataConfig(mask_documents=True))
    with IndexedDatasetWriter(tmp_path / "single", np.int32) as writer:
        for token in range(99):
            writer.add_document([token])
    with pytest.raises(InputError, match="mask_documents=True leaves no target: each document is one token long"):
        opened(tmp_path / "single", mask_documents=True)
