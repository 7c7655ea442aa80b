"""Start here when a shard file is refused or read wrongly."""

import zlib

import pytest
import torch
from safetensors import safe_open

from fused_megatron.checkpoint import CheckpointError, shard_file
from fused_megatron.checkpoint.shard_file import Entry, ShardFileReader, write_shard_file
from fused_megatron.weight_files import SAFETENSORS_DTYPES


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def random_bits(shape, dtype):
    """Return random bit patterns, with NaN payloads and denormals among them."""
    raw = torch.randint(0, 256, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
    return ((raw & 1) if dtype == torch.bool else raw).view(dtype).reshape(shape)


def read_back(path, tensors, checksums):
    read = {}
    with ShardFileReader(path, list(tensors), 7) as reader:
        for entry in tensors:
            result = read[entry] = torch.empty(entry.shape or (1,), dtype=entry.dtype)

            def consume(start, rows, result=result):
                result[start : start + len(rows)] = rows

            reader.read(entry, checksums[entry.key], consume, entry.key)
    return read


@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 22])
def test_every_dtype_and_stride_comes_back_bit_for_bit(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", block_bytes)
    torch.manual_seed(0)
    tensors = {}
    for dtype in SAFETENSORS_DTYPES:
        name = str(dtype)
        views = {
            "plain": random_bits((5, 3), dtype),
            "transposed": random_bits((3, 5), dtype).t(),
            "strided": random_bits((4, 9), dtype)[:, ::2],
            "expanded": random_bits((1, 4), dtype).expand(3, 4),
            "scalar": random_bits((), dtype),
            "empty": random_bits((0, 4), dtype),
        }
        for kind, tensor in views.items():
            tensors[Entry(f"{name}.{kind}", dtype, tuple(tensor.shape))] = tensor
    conjugated = torch.randn(4, dtype=torch.complex64).conj()
    tensors[Entry("conjugated", torch.complex64, (4,))] = conjugated
    path = tmp_path / "f.safetensors"
    checksums = write_shard_file(path, tensors, 7)
    for entry, result in read_back(path, tensors, checksums).items():
        source = tensors[entry].resolve_conj()
        assert torch.equal(bits(result), bits(source)), entry
        assert checksums[entry.key] == zlib.crc32(bits(source).numpy().tobytes())


def test_the_safetensors_library_reads_it(tmp_path):
    torch.manual_seed(0)
    tensors = {
        Entry(f"{dtype}", dtype, (3, 5)): random_bits((3, 5), dtype)
        for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.bool)
    }
    write_shard_file(tmp_path / "f.safetensors", tensors, 7)
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}
        assert set(file.keys()) == {entry.key for entry in tensors}
        for entry, tensor in tensors.items():
            assert torch.equal(bits(file.get_tensor(entry.key)), bits(tensor))


def test_a_boolean_beyond_one_is_refused(tmp_path):
    entry = Entry("mask", torch.bool, (4,))
    path = tmp_path / "f.safetensors"
    write_shard_file(path, {entry: torch.tensor([True, False, True, True])}, 7)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x02")
    with ShardFileReader(path, [entry], 7) as reader, pytest.raises(CheckpointError, match="boolean"):
        reader.read(entry, zlib.crc32(b"\1\0\1\2"), None, "mask")


def test_an_existing_file_is_never_written_over(tmp_path):
    path = tmp_path / "f.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_shard_file(path, {Entry("a", torch.int8, (1,)): torch.zeros(1, dtype=torch.int8)}, 7)
    assert path.read_bytes() == b"old"
