"""The tokens of training sample i: a pure function of the document lengths, seq_len, seed and i."""

import functools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fused_megatron import extension
from fused_megatron.checks import check
from fused_megatron.data import compiled_index
from fused_megatron.reference import sample_index as reference

# Streams of the two random permutations of an epoch (fused_megatron.reference.sample_index.permutation).
_DOCUMENT_STREAM = 0
_SAMPLE_STREAM = 1
# A batch touches at most two epochs, unless epochs are tiny, and then they cost nothing to rebuild.
_EPOCHS_KEPT = 2


class _Epoch(NamedTuple):
    """Documents and samples of an epoch.

    Attributes:
        order: documents in the order of the concatenation.
        starts: start of each sample, and of one more, as (position in order, offset in the document).
        shuffle: samples in the order of training.
        empty_before: number of empty documents up to each position in order; None if no document is empty.
    """

    order: np.ndarray
    starts: np.ndarray
    shuffle: np.ndarray
    empty_before: np.ndarray | None


def too_few_tokens(total: int, seq_len: int) -> str:
    """Return the message for a text that is shorter than one sample."""
    return f"{total} tokens are too few for one sample of seq_len={seq_len} + 1: give more text or a smaller seq_len"


class SampleIndex:
    """An endless order of samples of seq_len + 1 tokens over packed documents.

    Epoch e shuffles the documents by (seed, e), concatenates them, and cuts the result into samples of seq_len + 1
    tokens. Neighbouring samples overlap by one token: a sample starts at the last token of the one before, so that
    every token except an epoch's first is a target once. The epoch then shuffles its samples by (seed, e). It leaves
    out the end of the concatenation (at most seq_len tokens, different ones in every epoch). Sample numbers continue
    from epoch to epoch.

    Memory: 8 bytes per document (16 if a document is empty) and 24 per sample, for each of two epochs.

    Args:
        lengths: int64 [num_documents], tokens of each document; zeros are allowed.
        seq_len: tokens of a sample, minus one.
        seed: any integer in [0, 2^64).

    Raises:
        InputError: there are fewer than seq_len + 1 tokens, or seed is out of range.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int) -> None:
        self.lengths = np.ascontiguousarray(lengths, dtype=np.int64)
        self.seq_len = seq_len
        self.seed = seed
        total = int(self.lengths.sum())
        check(seq_len >= 1, f"seq_len={seq_len} must be at least 1")
        check(0 <= seed < 1 << 64, f"seed={seed} must be in [0, 2^64)")
        check(total > seq_len, too_few_tokens(total, seq_len))
        self.samples_per_epoch = (total - 1) // seq_len
        self._has_empty = bool((self.lengths == 0).any())
        self._epochs: dict[int, _Epoch] = {}

    def pieces(self, sample: int) -> Iterator[tuple[int, int, int]]:
        """Yield the pieces of a sample in order, as (document, offset in the document, number of tokens)."""
        epoch, position = divmod(sample, self.samples_per_epoch)
        order, starts, shuffle, _ = self._epoch(epoch)
        return pieces_from(self.lengths, order, starts[shuffle[position]], self.seq_len + 1)

    def num_document_starts(self, first: int, count: int) -> int:
        """Count the documents that start after the first token of a sample, in samples first to first + count - 1."""
        found = 0
        while count > 0:
            epoch, position = divmod(first, self.samples_per_epoch)
            taken = min(count, self.samples_per_epoch - position)
            _, starts, shuffle, empty_before = self._epoch(epoch)
            samples = shuffle[position : position + taken]
            # The last token of a sample is the first of the next: all documents up to that one start in the sample.
            begins, ends = starts[samples, 0], starts[samples + 1, 0]
            found += int((ends - begins).sum())
            if empty_before is not None:
                found -= int((empty_before[ends] - empty_before[begins]).sum())
            first, count = first + taken, count - taken
        return found

    def _epoch(self, epoch: int) -> "_Epoch":
        if epoch not in self._epochs:
            while len(self._epochs) >= _EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
            builders = index_builders()
            order = builders.permutation(len(self.lengths), self.seed, epoch, _DOCUMENT_STREAM)
            starts = builders.build_sample_index(self.lengths, order, self.seq_len)
            shuffle = builders.permutation(self.samples_per_epoch, self.seed, epoch, _SAMPLE_STREAM)
            empty_before = np.cumsum(self.lengths[order] == 0) if self._has_empty else None
            self._epochs[epoch] = _Epoch(order, starts, shuffle, empty_before)
        return self._epochs[epoch]


def pieces_from(
    lengths: np.ndarray, order: np.ndarray, start: np.ndarray, count: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (document, offset, number of tokens) of the `count` tokens from start = (position in order, offset) on.

    It stops early at the end of the documents.
    """
    position, offset = int(start[0]), int(start[1])
    while count > 0 and position < len(order):
        document = int(order[position])
        taken = min(count, int(lengths[document]) - offset)
        if taken > 0:
            yield document, offset, taken
            count -= taken
        position, offset = position + 1, 0


@functools.cache
def index_builders() -> Any:
    """Return the compiled index builders; without them, warn once and return their reference in numpy."""
    try:
        compiled_index.load()
    except (OSError, AttributeError) as error:
        warnings.warn(
            f"fused_megatron: the compiled dataset index does not load ({error}); numpy builds it, slower. "
            f"To build it: {extension.HOW_TO_BUILD}",
            RuntimeWarning,
            stacklevel=2,
        )
        return reference
    return compiled_index
