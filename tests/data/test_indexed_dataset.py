"""Start here when an indexed dataset of Megatron-LM is refused or read wrongly."""

import errno
import gc
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest

from fused_megatron.checks import InputError
from fused_megatron.data import indexed_dataset
from fused_megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter, dataset_files, token_dtype

DOCUMENTS = [[1, 2, 3], [], [65535], list(range(100, 110))]


def pack(documents, *, code=8, letter="H", modes=False):
    """Pack (.bin, .idx) by hand as the format says, with one sequence per document."""
    size = struct.calcsize("<" + letter)
    lengths = [len(d) for d in documents]
    pointers = [sum(lengths[:i]) * size for i in range(len(lengths))]
    indices = list(range(len(documents) + 1))
    idx = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(indices))
    idx += struct.pack(f"<{len(lengths)}i", *lengths)
    idx += struct.pack(f"<{len(pointers)}q", *pointers)
    idx += struct.pack(f"<{len(indices)}q", *indices)
    idx += bytes(len(lengths)) if modes else b""
    tokens = [t for d in documents for t in d]
    return struct.pack(f"<{len(tokens)}{letter}", *tokens), idx


def put(folder, bin_bytes, idx_bytes, name="data"):
    bin_path, idx_path = dataset_files(folder / name)
    bin_path.write_bytes(bin_bytes)
    idx_path.write_bytes(idx_bytes)
    return folder / name


def write(prefix, documents, dtype=np.uint16):
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def as_lists(dataset):
    return [dataset[i].tolist() for i in range(len(dataset))]


@pytest.mark.parametrize(
    "code, letter, dtype",
    [(1, "B", "u1"), (2, "b", "i1"), (3, "h", "i2"), (4, "i", "i4"), (5, "q", "i8"), (8, "H", "u2")],
)
def test_bytes_are_the_formats_both_ways(tmp_path, code, letter, dtype):
    documents = [[1, 2, 3], [], [127], list(range(100, 110))]
    bin_bytes, idx_bytes = pack(documents, code=code, letter=letter)
    dataset = IndexedDataset(put(tmp_path, bin_bytes, idx_bytes))
    assert dataset.dtype == np.dtype(dtype) and as_lists(dataset) == documents
    assert dataset.total_tokens == 14 and dataset.num_documents == 4
    assert dataset.document_offsets().tolist() == [0, 3, 3, 4, 14]
    assert dataset.sequence_lengths.tolist() == [3, 0, 1, 10] and dataset.sequence_lengths.dtype == np.int32
    bin_path, idx_path = dataset_files(write(tmp_path / "ours", documents, dtype))
    assert bin_path.read_bytes() == bin_bytes and idx_path.read_bytes() == idx_bytes
    names = ["data.bin", "data.idx", "ours.bin", "ours.crc32.json", "ours.idx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_documents_of_several_sequences(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", np.int32) as writer:
        writer.add_document([1, 2, 3, 4], sequence_lengths=[3, 0, 1])
        writer.add_document([], sequence_lengths=[])
        writer.add_document(np.array([5, 6], dtype=np.int64))
    dataset = IndexedDataset(tmp_path / "data")
    assert as_lists(dataset) == [[1, 2, 3], [], [4], [5, 6]]
    assert dataset.document_indices.tolist() == [0, 3, 3, 4]
    assert dataset.document_offsets().tolist() == [0, 4, 4, 6]
    with (
        IndexedDatasetWriter(tmp_path / "other", np.int32) as writer,
        pytest.raises(InputError, match="add up to its 2"),
    ):
        writer.add_document([1, 2], sequence_lengths=[1])


def test_megatron_agrees(tmp_path):
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    write(tmp_path / "data", DOCUMENTS)
    theirs = megatron.IndexedDataset(str(tmp_path / "data"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_modes_are_read(tmp_path):
    dataset = IndexedDataset(put(tmp_path, *pack(DOCUMENTS, modes=True)))
    assert as_lists(dataset) == DOCUMENTS and dataset.sequence_modes.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("documents", [[], [[]], [[], []]])
def test_empty(tmp_path, documents):
    dataset = IndexedDataset(write(tmp_path / "data", documents))
    assert as_lists(dataset) == documents and dataset.total_tokens == 0
    assert dataset.tokens(0, 0).shape == (0,)


def test_access(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "data", DOCUMENTS))
    assert dataset[-1].tolist() == DOCUMENTS[-1] and dataset.tokens(2, 6).tolist() == [3, 65535, 100, 101]
    assert type(dataset[0]) is np.ndarray and dataset[0].dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        dataset[0][0] = 7
    for index in (4, -5):
        with pytest.raises(IndexError, match=r"data, which has 4"):
            dataset[index]
    for start, end in ((-1, 2), (3, 2), (0, 15)):
        with pytest.raises(IndexError, match="which has 14"):
            dataset.tokens(start, end)
    assert as_lists(pickle.loads(pickle.dumps(dataset))) == DOCUMENTS


def test_arrays_outlive_the_dataset(tmp_path):
    # In its own process: a fault here is a segmentation fault.
    write(tmp_path / "data", [list(range(1000))] * 50)
    code = (
        "import gc, sys\nfrom fused_megatron.data.indexed_dataset import IndexedDataset\n"
        "kept = [IndexedDataset(sys.argv[1])[i] for i in (0, 49)]\ngc.collect()\n"
        "assert sum(int(a.sum()) for a in kept) == 999000\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "data")], check=True, timeout=600)
    array = IndexedDataset(tmp_path / "data")[3]
    gc.collect()
    assert int(array.sum()) == 499500


def test_every_truncation_is_found_when_opened(tmp_path):
    bin_bytes, idx_bytes = pack(DOCUMENTS)
    for size in range(len(idx_bytes)):
        with pytest.raises(InputError, match=r"data\.idx: .* must be .*, not .*copy or build it again"):
            IndexedDataset(put(tmp_path, bin_bytes, idx_bytes[:size]))
    for size in range(len(bin_bytes)):
        with pytest.raises(InputError, match=rf"data\.bin: size .* must be 28 bytes, not {size}:"):
            IndexedDataset(put(tmp_path, bin_bytes[:size], idx_bytes))
    for extra in (1, 5, 100):
        with pytest.raises(InputError, match=r"data\.idx: size"):
            IndexedDataset(put(tmp_path, bin_bytes, idx_bytes + bytes(extra)))
        with pytest.raises(InputError, match=r"data\.bin: size"):
            IndexedDataset(put(tmp_path, bin_bytes + bytes(extra), idx_bytes))


def test_every_flipped_bit_of_the_index_is_found_when_opened(tmp_path):
    bin_bytes, idx_bytes = pack(DOCUMENTS)
    prefix = put(tmp_path, bin_bytes, idx_bytes)
    harmless = set()
    for bit in range(8 * len(idx_bytes)):
        flipped = bytearray(idx_bytes)
        flipped[bit // 8] ^= 1 << bit % 8
        dataset_files(prefix)[1].write_bytes(flipped)
        try:
            dataset = IndexedDataset(prefix)
        except InputError as error:
            assert "\n" not in str(error) and "data." in str(error)
        else:
            harmless.add(bit)
            assert as_lists(dataset) != [] and dataset.total_tokens == 14
    # Document boundaries 1, 2 and 3 may move between their neighbours: the format cannot detect that.
    first_index = 34 + 4 * 4 + 8 * 4
    boundaries = range(8 * (first_index + 8), 8 * (first_index + 32))
    assert all(bit in boundaries for bit in harmless)


@pytest.mark.parametrize(
    "offset, packed, message",
    [
        (0, b"X", r"the first 9 bytes must be b'MMIDIDX\\x00\\x00', not b'XMIDIDX"),
        (9, struct.pack("<Q", 2), "version must be 1, not 2"),
        (17, b"\x09", "dtype code must be in 1 to 8, not 9"),
        (17, b"\x07", r"dtype code must be that of an integer \(token ids\), not 7 \(float32\)"),
        (18, struct.pack("<Q", 2**64 - 1), r"size \(of 18446744073709551615 sequences"),
        (26, struct.pack("<Q", 0), "number of document indices must be at least 1, not 0"),
        (34, struct.pack("<i", -3), "length of sequence 0 must be at least 0, not -3"),
        (34 + 16 + 8, struct.pack("<q", 9), r"byte pointer of sequence 1 must be 6 \(the lengths before it\), not 9"),
        (34 + 48, struct.pack("<q", 1), "document index 0 must be 0, not 1"),
        (34 + 48 + 16, struct.pack("<q", 9), r"document index 3 must be at least 9 \(the one before\), not 3"),
        (34 + 48 + 32, struct.pack("<q", 5), r"the last document index must be 4 \(number of sequences\), not 5"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, offset, packed, message):
    bin_bytes, idx_bytes = pack(DOCUMENTS)
    damaged = idx_bytes[:offset] + packed + idx_bytes[offset + len(packed) :]
    with pytest.raises(InputError, match=message) as caught:
        IndexedDataset(put(tmp_path, bin_bytes, damaged))
    assert str(tmp_path / "data.idx") in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match=r"absent\.idx: no such file"):
        IndexedDataset(tmp_path / "absent")
    write(tmp_path / "data", DOCUMENTS)
    (tmp_path / "data.bin").unlink()
    with pytest.raises(InputError, match=r"data\.bin: no such file, but data\.idx is there"):
        IndexedDataset(tmp_path / "data")


def test_writer_refuses_what_would_not_come_back(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document([1])
        with pytest.raises(InputError, match=r"document 1: token id 65536 does not fit into uint16 \(0 to 65535\)"):
            writer.add_document([2, 65536])
        with pytest.raises(InputError, match="document 1: token id -1"):
            writer.add_document([-1, 3])
        with pytest.raises(TypeError, match="must be integers"):
            writer.add_document([1.5])
        with pytest.raises(TypeError, match="must be integers"):
            writer.add_document(np.zeros((2, 2), dtype=np.int64))
    assert as_lists(IndexedDataset(tmp_path / "data")) == [[1]]
    with pytest.raises(TypeError, match="dtype=float32 must be one of"):
        IndexedDatasetWriter(tmp_path / "other", np.float32)
    with pytest.raises(InputError, match=r"nowhere/data\.bin: cannot be written"):
        IndexedDatasetWriter(tmp_path / "nowhere" / "data", np.uint16)


def test_sequence_longer_than_the_format_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_dataset, "_MAX_SEQUENCE_LENGTH", 5)
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        with pytest.raises(InputError, match=r"document 0: a sequence of 6 tokens.*divide it by sequence_lengths"):
            writer.add_document(range(6))
        writer.add_document(range(6), sequence_lengths=[5, 1])


def test_a_failed_writer_leaves_what_was_there(tmp_path):
    write(tmp_path / "data", [[1, 2]])
    with pytest.raises(KeyError), IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document([9])
        raise KeyError
    assert as_lists(IndexedDataset(tmp_path / "data")) == [[1, 2]]
    assert len(list(tmp_path.iterdir())) == 3
    write(tmp_path / "data", [[9]])
    assert as_lists(IndexedDataset(tmp_path / "data")) == [[9]]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_disk_full_says_so(tmp_path):
    # The temporary file is a link to a device that is always full.
    (tmp_path / f"data.bin.tmp-{os.getpid()}").symlink_to("/dev/full")
    writer = IndexedDatasetWriter(tmp_path / "data", np.int64)
    with pytest.raises(InputError, match=r"data\.bin: the disk is full"):
        for _ in range(100):
            writer.add_document(range(100_000))
    assert list(tmp_path.iterdir()) == []


def test_file_size_limit_is_an_error(tmp_path):
    # With a file size limit, the write fails only when the file is synced or closed.
    code = (
        "import resource, signal, sys\nfrom fused_megatron.checks import InputError\n"
        "from fused_megatron.data.indexed_dataset import IndexedDatasetWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    with IndexedDatasetWriter(sys.argv[1], 'int64') as w: w.add_document(range(500))\n"
        "except InputError as error: print(error)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "data")]
    output = subprocess.run(command, check=True, timeout=600, capture_output=True, text=True).stdout
    assert f"cannot be written ({os.strerror(errno.EFBIG)})" in output
    assert list(tmp_path.iterdir()) == []


def test_token_dtype():
    assert token_dtype(65499) == np.uint16 and token_dtype(65500) == np.int32 and token_dtype(257) == np.uint16
