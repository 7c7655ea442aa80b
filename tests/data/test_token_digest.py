"""Start here when a flipped bit in a token file is not found, or intact files are called damaged."""

import json

import numpy as np
import pytest

from fused_megatron.checks import InputError
from fused_megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from fused_megatron.data.token_digest import (
    Checksums,
    TokenCheck,
    add_digest,
    check_small,
    damaged_blocks,
    digest_path,
    read_digest,
    spread_digest,
)


def write(prefix, count=40, **options):
    with IndexedDatasetWriter(prefix, np.uint16, **options) as writer:
        for i in range(count):
            writer.add_document(np.arange(i, i + 30))
    return prefix


def flip(path, position, bit=1):
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(bytes(data))


def test_a_writer_leaves_checksums_and_the_vocabulary(tmp_path):
    prefix = write(tmp_path / "data", vocab_size=100)
    digest = read_digest(prefix)
    assert (digest.num_bytes, digest.vocab_size, len(digest.blocks)) == (2400, 100, 1)
    assert IndexedDataset(prefix).digest == digest
    assert list(damaged_blocks(prefix, digest, [0])) == []
    assert add_digest(prefix, 100) == digest == read_digest(prefix)
    digest_path(prefix).unlink()
    assert IndexedDataset(prefix).digest is None and read_digest(prefix) is None
    check_small(prefix, None)
    with pytest.raises(InputError, match=r"document 3: token id 32 is not in \[0, vocab_size=32\)"):
        write(tmp_path / "other", vocab_size=32)


@pytest.mark.parametrize("block_bytes", [7, 64, 100, 1000])
def test_checksums_do_not_depend_on_the_sizes_of_the_writes(block_bytes):
    data = bytes(range(256)) * 2
    found = []
    for step in (1, 33, 64, 512):
        checksums = Checksums(block_bytes)
        for start in range(0, len(data), step):
            checksums.update(data[start : start + step])
        found.append(checksums.digest(b"", None))
    assert all(digest == found[0] for digest in found)
    assert len(found[0].blocks) == -(-512 // block_bytes)


@pytest.mark.parametrize("position", [0, 1000, 2399])
def test_a_flipped_bit_is_named_with_its_place(tmp_path, position):
    prefix = write(tmp_path / "data")
    digest = read_digest(prefix)
    flip(tmp_path / "data.bin", position)
    (problem,) = damaged_blocks(prefix, digest, [0])
    assert problem.startswith(f"{prefix}.bin: the checksum of bytes 0 to 2400 is ") and "data is damaged" in problem
    with pytest.raises(InputError, match=r"remove data\.crc32\.json"):
        check_small(prefix, digest)
    check = TokenCheck([(str(prefix), digest)])
    check.start()
    assert check.wait() == problem
    with (tmp_path / "data.bin").open("ab") as file:
        file.write(b"x")
    (problem,) = damaged_blocks(prefix, digest, [0])
    assert "2401 bytes long, must be 2400" in problem


def test_ranks_share_the_blocks(tmp_path):
    prefix = str(write(tmp_path / "data"))
    checksums = Checksums(100)
    checksums.update((tmp_path / "data.bin").read_bytes())
    digest = checksums.digest(b"", None)
    flip(tmp_path / "data.bin", 550)  # in block 5
    found = []
    for share in range(3):
        check = TokenCheck([(prefix, digest)], share, 3)
        check.start()
        found.append(check.wait())
    assert [problem is not None for problem in found] == [False, False, True]
    assert "bytes 500 to 600" in found[2]
    (tmp_path / "data.bin").unlink()  # a file that cannot be read is not damaged
    check = TokenCheck([(prefix, digest)])
    check.start()
    assert check.wait() is None
    check.close()


def test_a_damaged_index_and_a_damaged_digest(tmp_path):
    prefix = write(tmp_path / "data")
    flip(tmp_path / "data.idx", -1, 0)
    IndexedDataset(prefix)
    content = json.loads(digest_path(prefix).read_bytes())
    digest_path(prefix).write_text(json.dumps({**content, "idx_crc32": "00000000"}))
    with pytest.raises(InputError, match=r"data\.idx: its checksum is \w{8}, must be 00000000: the data is damaged"):
        IndexedDataset(prefix)
    for broken in ("[1]", "{", json.dumps({**content, "bin_crc32": []}), json.dumps({**content, "block_bytes": 0})):
        digest_path(prefix).write_text(broken)
        with pytest.raises(InputError, match=r"data\.crc32\.json: damaged .*: copy it again, or remove it"):
            read_digest(prefix)


def test_a_file_that_is_written_anew_has_checksums_of_its_own(tmp_path):
    prefix = write(tmp_path / "data", vocab_size=100)
    write(prefix, count=50)
    digest = read_digest(prefix)
    assert (digest.num_bytes, digest.vocab_size) == (3000, None)
    assert list(damaged_blocks(prefix, digest, [0])) == []


def test_files_of_other_tokens_are_told_apart_without_reading_them(tmp_path):
    one, two = (str(write(tmp_path / name)) for name in ("one", "two"))
    assert spread_digest([one]) == spread_digest([two])
    flip(tmp_path / "two.bin", 1234)
    assert spread_digest([one]) != spread_digest([two])
    (tmp_path / "two.bin").write_bytes(b"")
    assert spread_digest([one]) != spread_digest([two])
    with pytest.raises(InputError, match=r"three\.bin: cannot be read"):
        spread_digest([str(tmp_path / "three")])
