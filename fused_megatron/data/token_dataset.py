"""Training and validation samples of an indexed dataset, read as batches of tokens."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fused_megatron.checks import InputError, check, check_divisible
from fused_megatron.data.indexed_dataset import IndexedDataset
from fused_megatron.data.sample_index import SampleIndex, index_builders, pieces_from

# Marks positions without a token; as a target, it is the default ignore_index of cross_entropy.
PADDING = -100

# (document, offset in the document, number of tokens)
Piece = tuple[int, int, int]


@dataclass(frozen=True)
class DocumentRanges:
    """A selection of a dataset's tokens: document i is tokens starts[i] to starts[i] + lengths[i] - 1.

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
    """Return the ranges of all documents of the dataset."""
    offsets = dataset.document_offsets()
    return DocumentRanges(offsets[:-1], np.diff(offsets))


def held_out(index: int, fraction: float) -> bool:
    """Whether document `index` is held out for validation: `fraction` of all documents, evenly spread."""
    return int((index + 1) * fraction) != int(index * fraction)


def split_documents(dataset: IndexedDataset, validation_fraction: float) -> tuple[DocumentRanges, DocumentRanges]:
    """Divide the documents into (training, validation); no token belongs to both.

    Validation gets whole documents, evenly spread. With fewer than 1 / validation_fraction documents, it gets the last
    part of each.
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

    A batch depends only on the seed and on the number of samples consumed before; to resume, store that number. The
    global batch is the same for every data-parallel size, and data-parallel ranks read disjoint rows of it. Tensor- and
    pipeline-parallel ranks with the same dp_rank read the same rows.

    Args:
        dataset: the tokens.
        seq_len: sequence length of the model; a sample has one more token, for the last target.
        seed: seed of the order of documents and samples.
        documents: the part of the dataset to read; None for all.
        vocab_size: upper limit of token ids, checked in every batch; None for no check.

    Raises:
        InputError: there are too few tokens for one sample.
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

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document."""
        return int(self.documents.lengths.max())

    def sample(self, index: int) -> np.ndarray:
        """Return sample `index` of the endless order: int64 [seq_len + 1]."""
        return self.rows(index, 1)[0]

    def rows(self, first: int, count: int) -> np.ndarray:
        """Return samples first to first + count - 1 of the endless order: int64 [count, seq_len + 1].

        Raises:
            InputError: a token id is not in [0, vocab_size).
        """
        check(first >= 0, f"sample index {first} must not be negative")
        batch = np.empty((count, self.seq_len + 1), dtype=np.int64)
        for row in range(count):
            _fill(batch[row], self.dataset, self.documents, self.index.pieces(first + row))
        if self.vocab_size is not None:
            check_tokens(batch, self.vocab_size, lambda row, column: self._describe(first + row, column))
        return batch

    def document_starts(self, first: int, count: int) -> np.ndarray:
        """Return where documents start in samples first to first + count - 1: bool [count, seq_len + 1].

        The first token of a sample counts as the start of a document.
        """
        return _document_starts([self.index.pieces(first + row) for row in range(count)], self.seq_len)

    def num_document_starts(self, first: int, count: int) -> int:
        """Count the documents that start after the first token of a sample, without reading a token."""
        return self.index.num_document_starts(first, count)

    def batch(self, step: int, global_batch_size: int, dp_rank: int = 0, dp_size: int = 1) -> np.ndarray:
        """Return this rank's rows of the global batch of a step.

        Args:
            step: number of steps before this one, each with global_batch_size samples.
            global_batch_size: samples of one step over all data-parallel ranks.
            dp_rank: data-parallel rank, in [0, dp_size).
            dp_size: data-parallel size; must divide global_batch_size.

        Returns:
            int64 [global_batch_size / dp_size, seq_len + 1].
        """
        count = _rows_of_rank(global_batch_size, dp_rank, dp_size)
        return self.rows(step * global_batch_size + dp_rank * count, count)

    def _describe(self, sample: int, column: int) -> str:
        location = _location(self.dataset, self.documents, self.index.pieces(sample), column)
        return f"{location}, sample {sample}"


class ValidationDataset:
    """Validation samples: the documents in order; every token except the first is a target exactly once.

    The last sample is padded with -100 after the last token, and the last batch with samples of -100, so that all ranks
    read batches of one shape. To average, sum the losses of the real targets and divide by their number.

    Args:
        dataset: the tokens.
        seq_len: sequence length of the model.
        documents: the part of the dataset to read; None for all.
        vocab_size: upper limit of token ids, checked in every batch; None for no check.
        max_samples: most samples to read, evenly spread over all; None for all.

    Raises:
        InputError: there are fewer than two tokens.
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
        # The last row is the start of one more sample, which is shorter; it is used if it has a target.
        self._starts = starts if (total - 1) % seq_len else starts[:-1]
        if max_samples is not None and max_samples < len(self._starts):
            self._starts = self._starts[np.arange(max_samples) * len(self._starts) // max_samples]
        self.num_samples = len(self._starts)

    def num_batches(self, batch_size: int) -> int:
        """Return the number of batches that cover all samples; the last one may be padded."""
        return -(-self.num_samples // batch_size)

    def batch(self, index: int, batch_size: int, dp_rank: int = 0, dp_size: int = 1) -> np.ndarray:
        """Return this rank's rows of batch `index`: int64 [batch_size / dp_size, seq_len + 1], padded with -100."""
        count = _rows_of_rank(batch_size, dp_rank, dp_size)
        first = index * batch_size + dp_rank * count
        batch = np.full((count, self.seq_len + 1), PADDING, dtype=np.int64)
        for row in range(min(count, self.num_samples - first)):
            pieces = list(self._pieces(first + row))
            filled = _fill(batch[row], self.dataset, self.documents, pieces)
            if self.vocab_size is not None:
                describe = functools.partial(self._describe, pieces, first + row)
                check_tokens(batch[row : row + 1, :filled], self.vocab_size, describe)
        return batch

    def document_starts(self, first: int, count: int) -> np.ndarray:
        """Return where documents start in samples first to first + count - 1: bool [count, seq_len + 1].

        The first token of a sample counts as the start of a document; padding belongs to the document before it.
        """
        return _document_starts([self._pieces(first + row) for row in range(count)], self.seq_len)

    def _pieces(self, sample: int) -> Iterable[Piece]:
        """Yield the pieces of a sample, as SampleIndex.pieces; none of a sample of padding."""
        if sample >= self.num_samples:
            return ()
        return pieces_from(self.documents.lengths, self._order, self._starts[sample], self.seq_len + 1)

    def _describe(self, pieces: list[Piece], sample: int, row: int, column: int) -> str:
        return f"{_location(self.dataset, self.documents, pieces, column)}, validation sample {sample}"


def inputs_and_targets(batch: np.ndarray, document_starts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Divide rows of seq_len + 1 tokens into the model's inputs and its targets.

    Args:
        batch: int64 [B, seq_len + 1]; -100 is padding.
        document_starts: bool [B, seq_len + 1]: these tokens are no targets, except in the first column, which never has
            one. None: every token is a target.

    Returns:
        inputs int64 [B, seq_len], where padding has token id 0, and targets int64 [B, seq_len], where it has -100.
        Only the end of a row is padding, so no real token of a causal model attends to it.
    """
    inputs, targets = np.maximum(batch[:, :-1], 0), batch[:, 1:]
    return inputs, targets if document_starts is None else np.where(document_starts[:, 1:], PADDING, targets)


def check_tokens(batch: np.ndarray, vocab_size: int, describe: Callable[[int, int], str] | None = None) -> None:
    """Raise unless every token id is in [0, vocab_size).

    Args:
        batch: int64 [B, S].
        vocab_size: number of token ids of the model.
        describe: returns the origin of the token at (row, column), for the message.

    Raises:
        InputError: names the first wrong id and its origin.
    """
    # As unsigned numbers, negative ids are huge: one maximum finds ids that are too small or too large.
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


def _document_starts(samples: Sequence[Iterable[Piece]], seq_len: int) -> np.ndarray:
    starts = np.zeros((len(samples), seq_len + 1), dtype=bool)
    starts[:, 0] = True
    for row, pieces in enumerate(samples):
        column = 0
        for _, _, taken in pieces:
            starts[row, column] = True
            column += taken
    return starts


def _location(dataset: IndexedDataset, documents: DocumentRanges, pieces: Iterable[Piece], column: int) -> str:
    """Return the file and document of a sample's token."""
    for document, offset, taken in pieces:
        if column < taken:
            token = int(documents.starts[document]) + offset + column
            # Several documents may begin at a token; side="right" finds the last of them, which is not empty.
            number = int(np.searchsorted(dataset.document_offsets(), token, side="right")) - 1
            return f"{dataset.path_prefix}.bin, document {number}"
        column -= taken
    raise AssertionError("the column is not in the sample")
