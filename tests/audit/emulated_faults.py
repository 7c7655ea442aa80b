"""Tests of the CUDA emulation in a process with AddressSanitizer; test_cuda_emulation.py runs them."""

import ctypes
import os

import pytest
import torch


@pytest.fixture(scope="module")
def kernels():
    library = ctypes.CDLL(os.environ["FAULTY_KERNELS"])
    names = "sum shuffles reverse reverse_dynamic diverge at_different_shuffles copy copy_wide block many"
    for name in names.split():
        getattr(library, f"run_{name}").restype = ctypes.c_char_p
    library.fm_emulation_counted.restype = ctypes.c_char_p
    return library


def pointer(tensor, skip=0):
    return ctypes.c_void_p(tensor.data_ptr() + skip * tensor.element_size())


def test_shuffles_blocks_and_lanes(kernels):
    out = torch.empty(6)
    expected = [(sum(range(w * 32, w * 32 + 32)) + 32 * b) * 100 + 32 for b in range(3) for w in range(2)]
    for seed in (0, 1, 12):
        kernels.fm_emulation_set_seed(seed)
        assert kernels.run_sum(pointer(out)) == b""
        assert out.tolist() == expected


def test_kinds_of_shuffles(kernels):
    out = torch.empty(4, 32, dtype=torch.int64)
    assert kernels.run_shuffles(pointer(out)) == b""
    assert (out[:3] >> 40).tolist() == [[3] * 32, [*range(8, 32), *range(24, 32)], [i ^ 1 for i in range(32)]]
    assert out[3].tolist() == [3 << 30] * 32


def test_a_missing_barrier_shows_in_another_order(kernels):
    expected = [float(63 - i) for i in range(64)]
    different = 0
    for seed in range(8):
        out = torch.empty(64)
        kernels.fm_emulation_set_seed(seed)
        kernels.run_reverse(pointer(out), True)
        assert out.tolist() == expected
        kernels.run_reverse(pointer(out), False)
        different += out.tolist() != expected
    assert different == 8  # half of the values were not written yet


def test_dynamic_shared_memory(kernels):
    out = torch.empty(64)
    assert kernels.run_reverse_dynamic(pointer(out), 256) == b""
    assert out.tolist() == [float(63 - i) for i in range(64)]
    assert b"without cudaFuncSetAttribute: 65536 bytes" in kernels.run_reverse_dynamic(pointer(out), 65536)
    kernels.allow(65536)
    assert kernels.run_reverse_dynamic(pointer(out), 65536) == b""


@pytest.mark.parametrize("barrier,message", [(True, b"a __syncthreads that not"), (False, b"a shuffle that not")])
def test_divergence_is_an_error(kernels, barrier, message):
    said = kernels.run_diverge(barrier)
    assert said.startswith(b"CUDA emulation: fm::diverge: ") and message in said
    assert said.endswith(b"(block (0, 0, 0), thread (7, 0, 0))")
    assert kernels.run_sum(pointer(torch.empty(6))) == b""  # the next launch works


def test_lanes_at_different_shuffles(kernels):
    assert b"a shuffle that not all 32 lanes reach" in kernels.run_at_different_shuffles(pointer(torch.empty(32)))


def test_block_size(kernels):
    assert b"bad block size (33, 1, 1)" in kernels.run_block(33)


def test_accesses_outside_of_tensors(kernels):
    small, large = torch.randn(10), torch.empty(64)
    assert kernels.run_copy(pointer(small), pointer(large), 10) == b""
    assert torch.equal(large[:10], small) and large[10:].isnan().all()
    read = kernels.run_copy(pointer(small), pointer(large), 11)
    assert b"fm::copy: reads 4 bytes outside of any tensor: at byte 40 of a buffer of 40" in read
    assert read.endswith(b"thread (10, 0, 0))")
    written = kernels.run_copy(pointer(large), pointer(small), 64)
    assert b"writes 4 bytes outside of any tensor" in written
    assert b"reads 4 bytes outside" in kernels.run_copy(pointer(small, -1), pointer(large), 1)


def test_misaligned_access(kernels):
    out = torch.empty(200)
    assert kernels.run_copy_wide(pointer(out), pointer(out, 4)) == b""
    assert b"a misaligned access of 16 bytes" in kernels.run_copy_wide(pointer(out), pointer(out, 1))


def test_counted_bytes(kernels):
    source, result = torch.randn(200), torch.empty(200)
    kernels.fm_emulation_count(True)
    kernels.run_copy(pointer(source), pointer(result), 50)
    kernels.run_copy_wide(pointer(source), pointer(result))
    kernels.run_copy_wide(pointer(source), pointer(result))
    kernels.fm_emulation_count(False)
    kernels.run_copy(pointer(source), pointer(result), 50)
    lines = [line.split("\t") for line in kernels.fm_emulation_counted().decode().splitlines()]
    assert [(line[0], *line[2:]) for line in lines] == [
        ("fm::copy", "32", "0", "1", "load", "200", "224", "4:200"),
        ("fm::copy", "32", "0", "1", "store", "200", "224", "4:200"),
        ("fm::copy_wide", "32", "0", "2", "load", "1024", "1024", "16:1024"),
        ("fm::copy_wide", "32", "0", "2", "store", "1024", "1024", "16:1024"),
    ]
    assert lines[0][1] == "_ZN2fm4copyEPKfPfi"


def test_counts_of_a_sample_of_blocks_are_scaled(kernels):
    out = torch.full((1, 300), torch.nan)
    kernels.fm_emulation_set_sampled_blocks(4)
    kernels.fm_emulation_count(True)
    kernels.run_many(pointer(out))
    kernels.fm_emulation_count(False)
    kernels.fm_emulation_set_sampled_blocks(0)
    assert (~out[0].isnan()).nonzero().flatten().tolist() == [37, 112, 187, 262]
    assert kernels.fm_emulation_counted().decode().splitlines()[1].split("\t")[5:7] == ["store", "1200"]


def test_only_the_last_blocks(kernels):
    source, result = torch.randn(64), torch.empty(64)
    kernels.fm_emulation_set_last_blocks(1)
    kernels.run_copy(pointer(source), pointer(result), 64)
    kernels.fm_emulation_set_last_blocks(0)
    assert result[:32].isnan().all() and torch.equal(result[32:], source[32:])
