"""Samples of several datasets in fixed proportions, in an order that depends only on the weights and the seed."""

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from fused_megatron.checks import check
from fused_megatron.data.token_dataset import PADDING, TokenDataset, ValidationDataset

# Weights are compared as whole numbers of this sum, so that every machine finds the same order.
_SCALE = 1 << 40


class BlendOrder:
    """Which dataset, and which of its samples, sample i of a blend is.

    Dataset 0 takes each sample at which round(i w_0) grows; dataset 1 takes its share of the remaining samples in the
    same way, and so on. So a dataset takes its samples in its own order, evenly spread, and of the first i samples it
    has i w_d, up to one for each dataset before it. Any sample is found from its number, so that a resumed run, or
    another layout, continues the same order.

    Args:
        weights: shares of the datasets, above 0; their sum does not matter.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        total = sum(map(Fraction, weights))
        self._shares = [round(Fraction(weight) / total * _SCALE) for weight in weights]
        check(all(self._shares), f"weights={list(weights)} must not be that far apart")

    def counts(self, i: int) -> list[int]:
        """Return how many of the first i samples each dataset has."""
        counts, rest = [], sum(self._shares)
        for share in self._shares:
            counts.append((2 * i * share + rest) // (2 * rest))  # rounded; all that is left for the last dataset
            i, rest = i - counts[-1], rest - share
        return counts

    def sample(self, i: int) -> tuple[int, int]:
        """Return (dataset, number of its sample) of sample i."""
        before, after = self.counts(i), self.counts(i + 1)
        (dataset,) = (d for d in range(len(before)) if before[d] != after[d])
        return dataset, before[dataset]


class BlendedDataset:
    """Training samples of several datasets; the interface of a TokenDataset.

    Args:
        parts: the datasets, with the same seq_len.
        weights: share of the samples of each part.
    """

    def __init__(self, parts: Sequence[TokenDataset], weights: Sequence[float]) -> None:
        self.parts = list(parts)
        self.order = BlendOrder(weights)
        self.seq_len = self.parts[0].seq_len

    def rows(self, first: int, count: int) -> np.ndarray:
        """As TokenDataset.rows."""
        return self._gather(first, count, lambda part, sample: part.rows(sample, 1))

    def document_starts(self, first: int, count: int) -> np.ndarray:
        """As TokenDataset.document_starts."""
        return self._gather(first, count, lambda part, sample: part.document_starts(sample, 1))

    def num_document_starts(self, first: int, count: int) -> int:
        """As TokenDataset.num_document_starts: each part has consecutive samples of its own order."""
        before, after = self.order.counts(first), self.order.counts(first + count)
        pairs = zip(self.parts, before, after, strict=True)
        return sum(part.num_document_starts(start, end - start) for part, start, end in pairs)

    @property
    def longest_document(self) -> int:
        """As TokenDataset.longest_document."""
        return max(part.longest_document for part in self.parts)

    def _gather(self, first: int, count: int, read: Callable[[TokenDataset, int], np.ndarray]) -> np.ndarray:
        places = [self.order.sample(first + row) for row in range(count)]
        return np.concatenate([read(self.parts[part], sample) for part, sample in places])


class BlendedValidation:
    """Held-out samples of several datasets, one dataset after the other; the interface of a ValidationDataset.

    Args:
        parts: the held-out samples of each dataset, with the same seq_len.
    """

    def __init__(self, parts: "Sequence[ValidationDataset | BlendedValidation]") -> None:
        self.parts = list(parts)
        self.seq_len: int = parts[0].seq_len
        self._ends = np.cumsum([part.num_samples for part in parts])
        self.num_samples: int = int(self._ends[-1])

    def num_batches(self, batch_size: int) -> int:
        """As ValidationDataset.num_batches."""
        return -(-self.num_samples // batch_size)

    def batch(self, index: int, batch_size: int, dp_rank: int = 0, dp_size: int = 1) -> np.ndarray:
        """As ValidationDataset.batch."""
        count = batch_size // dp_size
        rows = np.full((count, self.seq_len + 1), PADDING, dtype=np.int64)
        for row in range(count):
            place = self._place(index * batch_size + dp_rank * count + row)
            if place is not None:
                rows[row] = place[0].batch(place[1], 1)[0]
        return rows

    def document_starts(self, first: int, count: int) -> np.ndarray:
        """As ValidationDataset.document_starts."""
        starts = np.zeros((count, self.seq_len + 1), dtype=bool)
        starts[:, 0] = True
        for row in range(count):
            place = self._place(first + row)
            if place is not None:
                starts[row] = place[0].document_starts(place[1], 1)[0]
        return starts

    def _place(self, sample: int) -> "tuple[ValidationDataset | BlendedValidation, int] | None":
        """Return the dataset and the number of its sample; None beyond the last sample."""
        if sample >= self.num_samples:
            return None
        part = int(np.searchsorted(self._ends, sample, side="right"))
        return self.parts[part], sample - int(self._ends[part - 1] if part else 0)
