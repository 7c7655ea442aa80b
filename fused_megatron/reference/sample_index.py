"""Start of each training sample, and the order of samples and documents: the definition, in NumPy.

csrc/host/dataset_index.cpp computes the same arrays bit for bit, and faster.
"""

import numpy as np

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MAX_TOKENS = 1 << 62  # leaves room for sums in 64 bits
_MAX_SEQ_LEN = 1 << 31


def permutation(count: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """Return a permutation of range(count): a pure function of its arguments, on every machine and in every version.

    Index i gets the key mix(base(seed, epoch, stream) + (i + 1) * gamma), where mix is the output function of
    splitmix64, and the indices are sorted by key. mix is a bijection and gamma is odd, so no two keys are equal.
    (NumPy may change the result of Generator.permutation between versions.)

    Args:
        count: number of indices.
        seed: in [0, 2^64).
        epoch: in [0, 2^64).
        stream: in [0, 2^64); a different number for each use, so that permutations are independent.

    Returns:
        int64 [count].

    Raises:
        ValueError: count is negative.
    """
    if count < 0:
        raise ValueError(f"count={count} must not be negative")
    base = np.zeros(1, dtype=np.uint64)
    for word in (seed, epoch, stream):
        base = _mix(base + np.uint64(word) + _GOLDEN_GAMMA)
    keys = _mix(base + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN_GAMMA)
    return np.argsort(keys).astype(np.int64)


def build_sample_index(lengths: np.ndarray, order: np.ndarray, seq_len: int) -> np.ndarray:
    """Cut the documents, concatenated in the given order, into samples of seq_len + 1 tokens.

    Sample i holds tokens i * seq_len ... (i + 1) * seq_len of the concatenation, so that neighbours share one token
    and every token but the first is a target once. The tokens left over at the end belong to no sample.

    Args:
        lengths: int64 [num_documents], tokens of each document; 0 is allowed.
        order: int64 [num_ordered], documents in the order of the concatenation.
        seq_len: tokens of a sample, less one.

    Returns:
        int64 [num_samples + 1, 2] with num_samples = (total - 1) // seq_len: row i is the position in `order` of the
        document that contains token i * seq_len, and the offset of that token in it. [0, 2] if there are no tokens.

    Raises:
        ValueError: an index out of range, a negative length, seq_len out of [1, 2^31], more than 2^62 tokens.
    """
    if lengths.ndim != 1 or order.ndim != 1:
        raise ValueError("lengths and order must have one dimension")
    if not 1 <= seq_len <= _MAX_SEQ_LEN:
        raise ValueError(f"seq_len={seq_len} must be in [1, 2^31]")
    if order.size and not (order.min() >= 0 and order.max() < lengths.size):
        p = int(np.argmax((order < 0) | (order >= lengths.size)))
        raise ValueError(f"order[{p}]={order[p]} must be a document in [0, {lengths.size})")
    ordered = lengths[order]
    # A float64 sum cannot wrap around, so that it detects an overflow of the exact sum below.
    if ordered.size and (ordered.min() < 0 or float(ordered.sum(dtype=np.float64)) > _MAX_TOKENS):
        raise ValueError("lengths must not be negative, nor their sum pass 2^62")
    ends = np.cumsum(ordered, dtype=np.int64)
    total = int(ends[-1]) if ends.size else 0
    if total == 0:
        return np.empty((0, 2), dtype=np.int64)
    starts = np.arange((total - 1) // seq_len + 1, dtype=np.int64) * seq_len
    # side="right" skips documents without tokens.
    position = np.searchsorted(ends, starts, side="right")
    return np.stack([position, starts - (ends - ordered)[position]], axis=1)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
