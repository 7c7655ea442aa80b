"""Batches of tokens for training and validation, drawn from an indexed dataset."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from fused_megatron.checks import InputError, check, check_divisible
from fused_megatron.data.indexed_dataset import IndexedDataset
from fused_megatron.data.sample_index import SampleIndex, index_builders, pieces_from

# Marks places without a token; as a target it is cross_entropy's default ignore_index.
PADDING = -100

# (document, offset in it, number of tokens)
Piece = tuple[int, int, int]


@dataclass(frozen=True)
class DocumentRanges:
    """A selection of a dataset's tokens: document i is tokens starts[i] ... starts[i] + lengths[i].

    Attributes:
        starts: int64 [num_documents].
        lengths: int64 [num_documents].
    """

    starts: np.ndarray
    lengths: np.ndarray

    @property
    def total_tokens(self) -> int:
        """Number of tokens selected."""
        return int(self.lengths.sum())


def all_documents(dataset: IndexedDataset) -> DocumentRanges:
    """Every document of the dataset."""
    offsets = dataset.document_offsets()
    return DocumentRanges(offsets[:-1], np.diff(offsets))


def held_out(index: int, fraction: float) -> bool:
    """Whether document `index` belongs to the validation part: evenly spread, `fraction` of all."""
    return int((index + 1) * fraction) != int(index * fraction)


def split_documents(dataset: IndexedDataset, validation_fraction: float) -> tuple[DocumentRanges, DocumentRanges]:
    """Divide the documents into (training, validation); no token belongs to both.

    Whole documents are held out, evenly spread. Where there are too few for one to be (less than 1 / fraction), the
    last part of each document is.
    """
    documents = all_documents(dataset)
    count = len(documents.lengths)
    if int(count * validation_fraction) == 0:
        tails = (documents.lengths * validation_fraction).astype(np.int64)
        heads = documents.lengths - tails
        return DocumentRanges(documents.starts, heads), DocumentRanges(documents.starts + heads, tails)
    chosen = np.diff((np.arange(count + 1) * validation_fraction).astype(np.int64)) > 0
    return (
        DocumentRanges(documents.starts[~chosen], documents.lengths[~chosen]),
        DocumentRanges(documents.starts[chosen], documents.lengths[chosen]),
    )


class TokenDataset:
    """Training samples of seq_len + 1 tokens in an endless, reproducible order.

    What a batch holds depends on seed and on the number of samples consumed before, on nothing else: to resume,
    remember that one integer. The ranks of the data-parallel group read disjoint rows of one global batch that is the
    same at every data-parallel size; tensor- and pipeline-parallel ranks of one dp_rank read the same rows.

    Args:
        dataset: the tokens.
        seq_len: tokens that a model sees at once; a sample has one more, for the last target.
        seed: of the order of documents and samples.
        documents: which part of the dataset; None for all.
        vocab_size: checked against every batch that is drawn; None for no check.

    Raises:
        InputError: too few tokens for one sample.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        seq_len: int,
        seed: int,
        *,
        documents: DocumentRanges | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.documents = all_documents(dataset) if documents is None else documents
        self.vocab_size = vocab_size
        try:
            self.index = SampleIndex(self.documents.lengths, seq_len, seed)
        except InputError as error:
            raise InputError(f"{dataset.path_prefix}: {error}") from None
        self.seq_len = seq_len
        self.samples_per_epoch = self.index.samples_per_epoch

    def sample(self, index: int) -> np.ndarray:
        """int64 [seq_len + 1]: sample `index` of the endless order."""
        return self.rows(index, 1)[0]

    def rows(self, first: int, count: int) -> np.ndarray:
        """int64 [count, seq_len + 1]: samples first ... first + count of the endless order.

        Raises:
            InputError: a token id beyond vocab_size.
        """
        check(first >= 0, f"sample index {first} must not be negative")
        batch = np.empty((count, self.seq_len + 1), dtype=np.int64)
        for row in range(count):
            _fill(batch[row], self.dataset, self.documents, self.index.pieces(first + row))
        if self.vocab_size is not None:
            check_tokens(batch, self.vocab_size, lambda row, column: self._describe(first + row, column))
        return batch

    def batch(self, step: int, global_batch_size: int, dp_rank: int = 0, dp_size: int = 1) -> np.ndarray:
        """This rank's rows of a step's global batch.

        Args:
            step: steps before this one, all of global_batch_size samples.
            global_batch_size: samples of one step over all data-parallel ranks.
            dp_rank: in [0, dp_size).
            dp_size: divides global_batch_size.

        Returns:
            int64 [global_batch_size / dp_size, seq_len + 1].
        """
        count = _rows_of_rank(global_batch_size, dp_rank, dp_size)
        return self.rows(step * global_batch_size + dp_rank * count, count)

    def _describe(self, sample: int, column: int) -> str:
        place = _place(self.dataset, self.documents, self.index.pieces(sample), column)
        return f"{place}, sample {sample}"


class ValidationDataset:
    """Validation samples: the documents in order, every token but the first a target exactly once.

    The last sample is padded where the tokens end, and the last batch with empty samples, both by -100, so that all
    ranks see batches of one shape: sum the losses of real targets and divide by their number.

    Args:
        dataset: the tokens.
        seq_len: tokens that a model sees at once.
        documents: which part of the dataset; None for all.
        vocab_size: checked against every batch that is drawn; None for no check.
        max_samples: at most so many samples, evenly spread over all; None for all.

    Raises:
        InputError: fewer than two tokens.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        seq_len: int,
        *,
        documents: DocumentRanges | None = None,
        vocab_size: int | None = None,
        max_samples: int | None = None,
    ) -> None:
        check(seq_len >= 1, f"seq_len={seq_len} must be at least 1")
        check(max_samples is None or max_samples >= 1, f"max_samples={max_samples} must be at least 1")
        self.dataset = dataset
        self.documents = all_documents(dataset) if documents is None else documents
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        total = self.documents.total_tokens
        check(
            total >= 2,
            f"{dataset.path_prefix}: {total} held-out tokens are too few for validation: give more text, or a larger "
            f"validation_fraction",
        )
        self._order = np.arange(len(self.documents.lengths), dtype=np.int64)
        lengths = np.ascontiguousarray(self.documents.lengths, dtype=np.int64)
        starts = index_builders().build_sample_index(lengths, self._order, seq_len)
        # The last row is where a next sample would start: a shorter one, if a target is left for it.
        self._starts = starts if (total - 1) % seq_len else starts[:-1]
        if max_samples is not None and max_samples < len(self._starts):
            self._starts = self._starts[np.arange(max_samples) * len(self._starts) // max_samples]
        self.num_samples = len(self._starts)

    def num_batches(self, batch_size: int) -> int:
        """Batches that cover every sample, the last one padded."""
        return -(-self.num_samples // batch_size)

    def batch(self, index: int, batch_size: int, dp_rank: int = 0, dp_size: int = 1) -> np.ndarray:
        """This rank's rows of batch `index`: int64 [batch_size / dp_size, seq_len + 1], -100 where no token is."""
        count = _rows_of_rank(batch_size, dp_rank, dp_size)
        first = index * batch_size + dp_rank * count
        batch = np.full((count, self.seq_len + 1), PADDING, dtype=np.int64)
        for row in range(min(count, self.num_samples - first)):
            start = self._starts[first + row]
            pieces = list(pieces_from(self.documents.lengths, self._order, start, self.seq_len + 1))
            filled = _fill(batch[row], self.dataset, self.documents, pieces)
            if self.vocab_size is not None:
                describe = functools.partial(self._describe, pieces, first + row)
                check_tokens(batch[row : row + 1, :filled], self.vocab_size, describe)
        return batch

    def _describe(self, pieces: list[Piece], sample: int, row: int, column: int) -> str:
        return f"{_place(self.dataset, self.documents, pieces, column)}, validation sample {sample}"


def inputs_and_targets(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide rows of seq_len + 1 tokens into what the model sees and what it is to predict.

    Args:
        batch: int64 [B, seq_len + 1], -100 where no token is.

    Returns:
        inputs int64 [B, seq_len] with token 0 in place of padding, targets int64 [B, seq_len] with -100 there.
        Padding stands only at the end of a row, where no real token of a causal model attends to it.
    """
    return np.maximum(batch[:, :-1], 0), batch[:, 1:]


def check_tokens(batch: np.ndarray, vocab_size: int, describe: Callable[[int, int], str] | None = None) -> None:
    """Raise unless every token id is in [0, vocab_size).

    Args:
        batch: int64 [B, S].
        vocab_size: number of ids that the model knows.
        describe: (row, column) to where that token came from, for the message.

    Raises:
        InputError: names the first such id and where it came from.
    """
    # As unsigned numbers negative ids are huge: one pass finds both ends.
    if batch.size == 0 or int(np.ascontiguousarray(batch, dtype=np.int64).view(np.uint64).max()) < vocab_size:
        return
    row, column = (int(i) for i in np.argwhere((batch < 0) | (batch >= vocab_size))[0])
    where = "batch" if describe is None else describe(row, column)
    raise InputError(
        f"{where}: token id {batch[row, column]} at row {row}, column {column} is not in [0, vocab_size={vocab_size}): "
        f"the data is damaged, or was made with another tokenizer; build it again or set vocab_size"
    )


def _rows_of_rank(batch_size: int, dp_rank: int, dp_size: int) -> int:
    check(batch_size >= 1, f"global_batch_size={batch_size} must be at least 1")
    check_divisible("global_batch_size", batch_size, "data_parallel_size", dp_size)
    check(0 <= dp_rank < dp_size, f"dp_rank={dp_rank} must be in [0, dp_size={dp_size})")
    return batch_size // dp_size


def _fill(out: np.ndarray, dataset: IndexedDataset, documents: DocumentRanges, pieces: Iterable[Piece]) -> int:
    filled = 0
    for document, offset, taken in pieces:
        start = int(documents.starts[document]) + offset
        out[filled : filled + taken] = dataset.tokens(start, start + taken)
        filled += taken
    return filled


def _place(dataset: IndexedDataset, documents: DocumentRanges, pieces: Iterable[Piece], column: int) -> str:
    """The file and document of a sample's token."""
    for document, offset, taken in pieces:
        if column < taken:
            token = int(documents.starts[document]) + offset + column
            # side="right" names the last of the documents that begin there: the one that is not empty.
            number = int(np.searchsorted(dataset.document_offsets(), token, side="right")) - 1
            return f"{dataset.path_prefix}.bin, document {number}"
        column -= taken
    raise AssertionError("the column is not in the sample")
