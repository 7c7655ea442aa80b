"""Rectangles of queries and keys that see each other, planned on the host from documents, windows and positions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

Ranges = Sequence[tuple[int, int]]
"""(start, stop) of runs of positions, in the order of the rows that hold them."""


@dataclass(frozen=True)
class PairTile:
    """A rectangle of queries and keys of one document, each at consecutive positions.

    Query i and key j, counted from the first of the tile, see each other if i + lower <= j <= i + upper. Every query of
    a tile sees a key of it, and every key is seen.

    Attributes:
        samples: (start, stop) of the rows of the batch.
        queries, keys: (start, stop) of the rows of the query and of the key tensor.
        query_position, key_position: position of the first query and of the first key in the whole sequence.
        upper: last key that query 0 sees; None: every query sees all keys up to the last one.
        lower: first key that query 0 sees; None: every query sees all keys from the first one on.
    """

    samples: tuple[int, int]
    queries: tuple[int, int]
    keys: tuple[int, int]
    query_position: int
    key_position: int
    upper: int | None = None
    lower: int | None = None

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return self.samples[1] - self.samples[0]

    @property
    def num_queries(self) -> int:
        """Number of query rows of a sample."""
        return self.queries[1] - self.queries[0]

    @property
    def num_keys(self) -> int:
        """Number of key rows of a sample."""
        return self.keys[1] - self.keys[0]

    @property
    def num_pairs(self) -> int:
        """Number of pairs that see each other, over all samples."""
        rows = np.arange(self.num_queries)
        last = self.num_keys - 1 if self.upper is None else np.minimum(rows + self.upper, self.num_keys - 1)
        first = 0 if self.lower is None else np.maximum(rows + self.lower, 0)
        per_sample = np.broadcast_to(last - first + 1, rows.shape)
        return int(per_sample.sum()) * self.num_samples

    def part(self, first_query: int, last_query: int, first_key: int, last_key: int) -> PairTile:
        """Return the tile of queries first_query to last_query and keys first_key to last_key, counted in this tile."""
        shift = first_query - first_key
        return PairTile(
            self.samples,
            (self.queries[0] + first_query, self.queries[0] + last_query + 1),
            (self.keys[0] + first_key, self.keys[0] + last_key + 1),
            self.query_position + first_query,
            self.key_position + first_key,
            None if self.upper is None else self.upper + shift,
            None if self.lower is None else self.lower + shift,
        ).without_idle_bounds()

    def without_idle_bounds(self) -> PairTile:
        """Return the same tile with None for a bound that hides no key."""
        upper = None if self.upper is None or self.upper >= self.num_keys - 1 else self.upper
        lower = None if self.lower is None or self.lower + self.num_queries - 1 <= 0 else self.lower
        return replace(self, upper=upper, lower=lower)


@dataclass(frozen=True)
class Visibility:
    """What queries may see, as numbers on the host.

    Attributes:
        causal: a query sees no later key.
        window: number of keys, up to and with its own, that a query sees; None: no limit. Needs causal.
        starts: for each sample the positions at which its documents start, ascending from 0.
        seq_len: S, the length of the whole sequence.
    """

    causal: bool
    window: int | None
    starts: tuple[tuple[int, ...], ...]
    seq_len: int

    @classmethod
    def of_documents(
        cls, causal: bool, window: int | None, documents: Sequence[int] | None, batch: int, seq_len: int
    ) -> Visibility:
        """Return the visibility for cumulative lengths over the B S tokens, row after row; None: one document a row."""
        if documents is None:
            return cls(causal, window, ((0,),) * batch, seq_len)
        starts: list[list[int]] = [[0] for _ in range(batch)]
        for token in documents:
            sample, position = divmod(int(token), seq_len)
            if sample < batch and position > starts[sample][-1]:
                starts[sample].append(position)
        return cls(causal, window, tuple(map(tuple, starts)), seq_len)

    def tiles(self, queries: Ranges, keys: Ranges) -> tuple[PairTile, ...]:
        """Return the tiles of query rows at some positions and key rows at others; no pair is in two tiles.

        Args:
            queries, keys: positions of the rows, e.g. SequenceLayout.ranges.
        """
        found = []
        for samples, starts in self._samples_with_equal_documents():
            pieces = _pieces_by_document(keys, starts, self.seq_len)
            for document, query_pieces in _pieces_by_document(queries, starts, self.seq_len).items():
                for query_piece in query_pieces:
                    tiles = (self._tile(samples, query_piece, key_piece) for key_piece in pieces.get(document, ()))
                    found += [tile for tile in tiles if tile is not None]
        return tuple(found)

    def pairs_of_positions(self) -> np.ndarray:
        """Return the number of keys that the queries at each position see, summed over the samples, [S] int64."""
        total = np.zeros(self.seq_len, dtype=np.int64)
        positions = np.arange(self.seq_len, dtype=np.int64)
        for samples, starts in self._samples_with_equal_documents():
            lengths = np.diff([*starts, self.seq_len])
            if self.causal:
                seen = positions - np.repeat(np.asarray(starts, dtype=np.int64), lengths) + 1
                seen = seen if self.window is None else np.minimum(seen, self.window)
            else:
                seen = np.repeat(lengths, lengths)
            total += seen * (samples[1] - samples[0])
        return total

    def _samples_with_equal_documents(self) -> Iterator[tuple[tuple[int, int], tuple[int, ...]]]:
        """Group neighbouring samples whose documents start at the same positions."""
        first = 0
        for sample in range(1, len(self.starts) + 1):
            if sample == len(self.starts) or self.starts[sample] != self.starts[first]:
                yield (first, sample), self.starts[first]
                first = sample

    def _tile(self, samples: tuple[int, int], query: _Piece, key: _Piece) -> PairTile | None:
        """Return the tile of two pieces of a document, without rows that see nothing; None if nothing is visible."""
        q_start, q_stop, k_start, k_stop = query.start, query.stop, key.start, key.stop
        if self.causal:
            q_start = max(q_start, k_start)
            q_stop = q_stop if self.window is None else min(q_stop, k_stop + self.window - 1)
            if q_start >= q_stop:
                return None
            k_stop = min(k_stop, q_stop)
            k_start = k_start if self.window is None else max(k_start, q_start - self.window + 1)
        if q_start >= q_stop or k_start >= k_stop:
            return None
        upper = q_start - k_start if self.causal else None
        lower = None if self.window is None else q_start - k_start - self.window + 1
        rows = query.rows(q_start, q_stop), key.rows(k_start, k_stop)
        return PairTile(samples, *rows, q_start, k_start, upper, lower).without_idle_bounds()


@dataclass(frozen=True)
class _Piece:
    """Consecutive positions of one document in consecutive rows, the first in row `row`."""

    start: int
    stop: int
    row: int

    def rows(self, start: int, stop: int) -> tuple[int, int]:
        return self.row + start - self.start, self.row + stop - self.start


def _pieces_by_document(ranges: Ranges, starts: tuple[int, ...], seq_len: int) -> dict[int, list[_Piece]]:
    """Cut the ranges at the starts of documents; the keys are indices of documents, ascending within each range."""
    found = defaultdict(list)
    bounds = np.asarray([*starts, seq_len])
    row = 0
    for start, stop in ranges:
        document = int(np.searchsorted(bounds, start, side="right")) - 1
        position = start
        while position < stop:
            end = min(stop, int(bounds[document + 1]))
            found[document].append(_Piece(position, end, row + position - start))
            position, document = end, document + 1
        row += stop - start
    return found
