"""Start here when the compiled sample index differs from the one in Python."""

import threading

import numpy as np
import pytest

from fused_megatron.data import compiled_index as compiled
from fused_megatron.reference import sample_index as reference

pytestmark = pytest.mark.skipif(not compiled.LIBRARY.exists(), reason="the compiled dataset index is not built")
BOTH = pytest.mark.parametrize("builders", [reference, compiled], ids=["numpy", "compiled"])


def splitmix64(state):
    """The published generator in Python integers: returns the output for a state that was just advanced."""
    mask = 2**64 - 1
    z = state & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


@BOTH
@pytest.mark.parametrize("seed, epoch, stream", [(0, 0, 0), (1234, 5, 1), (2**64 - 1, 2**40, 3)])
def test_permutation_is_the_sorted_keys(builders, seed, epoch, stream):
    gamma = 0x9E3779B97F4A7C15
    base = splitmix64(splitmix64(splitmix64(seed + gamma) + epoch + gamma) + stream + gamma)
    keys = [splitmix64(base + (i + 1) * gamma) for i in range(100)]
    expected = sorted(range(100), key=keys.__getitem__)
    result = builders.permutation(100, seed, epoch, stream)
    assert result.tolist() == expected and result.dtype == np.int64


def test_splitmix64_gives_the_published_numbers():
    # First outputs of splitmix64 for the seed 1234567, from its author's reference and Rosetta Code.
    state, outputs = 1234567, []
    for _ in range(3):
        state += 0x9E3779B97F4A7C15
        outputs.append(splitmix64(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@BOTH
def test_permutation_depends_on_everything(builders):
    count = 200
    results = [
        builders.permutation(count, seed, epoch, stream) for seed in (0, 1) for epoch in range(3) for stream in (0, 1)
    ]
    assert len({r.tobytes() for r in results}) == len(results)
    assert all(np.array_equal(np.sort(r), np.arange(count)) for r in results)
    assert builders.permutation(0, 1, 1, 1).shape == (0,)
    with pytest.raises(ValueError, match="count=-1 must not be negative"):
        builders.permutation(-1, 0, 0, 0)


def test_permutation_has_no_bias():
    # Each of the 24 orders of 4 items has probability 1/24; 6 standard deviations is far beyond chance.
    draws = 24_000
    seen = {}
    for seed in range(draws):
        key = tuple(compiled.permutation(4, seed, 0, 0))
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 24
    assert max(abs(n - draws / 24) for n in seen.values()) < 6 * (draws / 24) ** 0.5


def random_case(rng):
    count = int(rng.integers(0, 25))
    lengths = rng.integers(0, int(rng.integers(1, 20)), size=count)
    return lengths.astype(np.int64), rng.permutation(count).astype(np.int64), int(rng.integers(1, 12))


@BOTH
def test_against_concatenation(builders):
    rng = np.random.default_rng(1)
    for _ in range(400):
        lengths, order, seq_len = random_case(rng)
        where = [(p, offset) for p, d in enumerate(order) for offset in range(lengths[d])]
        result = builders.build_sample_index(lengths, order, seq_len)
        assert result.dtype == np.int64 and result.ndim == 2 and result.shape[1] == 2
        assert result.tolist() == [list(w) for w in where[::seq_len]]


def test_compiled_equals_numpy():
    rng = np.random.default_rng(2)
    for _ in range(200):
        lengths, order, seq_len = random_case(rng)
        ours, theirs = (b.build_sample_index(lengths, order, seq_len) for b in (compiled, reference))
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
        seed, epoch = (int(x) for x in rng.integers(0, 2**63, size=2))
        count = int(rng.integers(0, 3000))
        assert np.array_equal(compiled.permutation(count, seed, epoch, 1), reference.permutation(count, seed, epoch, 1))


@BOTH
def test_more_tokens_than_32_bits_count(builders):
    lengths = np.array([3 * 2**31, 0, 5, 2**33], dtype=np.int64)
    seq_len = 2**28 + 3
    result = builders.build_sample_index(lengths, np.array([2, 1, 3, 0]), seq_len)
    assert len(result) == (3 * 2**31 + 5 + 2**33 - 1) // seq_len + 1
    before = np.array([0, 5, 5, 5 + 2**33])  # tokens before each position of the order
    assert np.array_equal(before[result[:, 0]] + result[:, 1], np.arange(len(result)) * seq_len)
    assert (result[:, 1] < lengths[np.array([2, 1, 3, 0])][result[:, 0]]).all()


@BOTH
@pytest.mark.parametrize(
    "lengths, order, seq_len, message",
    [
        ([3, 4], [0, 2], 2, r"order\[1\]=2 must be a document in \[0, 2\)"),
        ([3, 4], [-1, 0], 2, r"order\[0\]=-1 must be a document in \[0, 2\)"),
        ([3, -4], [0, 1], 2, "must not be negative"),
        ([2**62, 2**62], [0, 1], 2**30, r"nor the(ir)? sum"),
        ([2**63 - 1, 2**63 - 1], [0, 1], 2, r"nor the(ir)? sum"),
        ([3, 4], [0, 1], 0, r"seq_len=0 must be in \[1, 2\^31\]"),
        ([3, 4], [0, 1], 2**31 + 1, r"must be in \[1, 2\^31\]"),
        ([[3, 4]], [0, 1], 2, "one dimension"),
        ([3, 4], [[0, 1]], 2, "one dimension"),
    ],
)
def test_inconsistent_input_raises(builders, lengths, order, seq_len, message):
    with pytest.raises(ValueError, match=message):
        builders.build_sample_index(np.array(lengths, dtype=np.int64), np.array(order, dtype=np.int64), seq_len)


def test_compiled_takes_no_other_dtype():
    lengths = np.array([3, 4], dtype=np.int64)
    for wrong in (lengths.astype(np.int32), lengths.astype(np.float64), [3, 4], np.repeat(lengths, 2)[::2], None):
        with pytest.raises(TypeError, match="lengths must be a contiguous int64 array, not a "):
            compiled.build_sample_index(wrong, lengths, 2)


@pytest.mark.parametrize("name", ["seed", "epoch", "stream"])
@pytest.mark.parametrize("value", [-1, 2**64])
def test_compiled_takes_no_number_beyond_64_bits(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value} must be in \[0, 2\^64\)"):
        compiled.permutation(**{"count": 3, "seed": 0, "epoch": 0, "stream": 0, name: value})


def test_memory_that_runs_out_in_the_library_is_an_error():
    with pytest.raises(MemoryError):
        compiled._call("dataset_index_permutation", 2**56, 0, 0, 0, None)


def test_compiled_releases_the_interpreter_lock():
    # While one thread sorts, this thread must run many times.
    done = threading.Event()

    def work():
        compiled.permutation(3_000_000, 0, 0, 0)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    turns = 0
    while not done.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 5
