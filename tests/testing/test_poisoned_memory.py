"""Start here when a stray access to memory is not found."""

import pytest
import torch

from fused_megatron.testing.poisoned_memory import PoisonedMemory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("skip", [0, 1, 3])
def test_placement(dtype, skip):
    memory = PoisonedMemory()
    x = memory.place(torch.arange(6).to(dtype).view(2, 3), skip=skip)
    out = memory.empty((5,), dtype, skip=skip)
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]] and x.is_contiguous()
    assert (x.data_ptr() - skip * dtype.itemsize) % 64 == 0
    assert (out == -1).all() if dtype == torch.int64 else out.isnan().all()
    out.fill_(1)
    memory.check()


@pytest.mark.parametrize("where,message", [(-1, "out: written before"), (4, "out: written past")])
def test_stray_write(where, message):
    memory = PoisonedMemory()
    out = memory.empty((4,), torch.float32, name="out")
    out.as_strided((1,), (1,), out.storage_offset() + where).fill_(0)
    with pytest.raises(AssertionError, match=message):
        memory.check()


def test_written_input():
    memory = PoisonedMemory()
    x = memory.place(torch.ones(4), name="x")
    x[2] = 5
    with pytest.raises(AssertionError, match="x: an input was written to"):
        memory.check()
