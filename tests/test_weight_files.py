"""Start here when a safetensors file, or a slice of one, is read wrongly."""

import pytest
import torch
from safetensors.torch import save_file

from fused_megatron import weight_files
from fused_megatron.checks import InputError
from fused_megatron.weight_files import WeightFiles

TENSORS = {
    "matrix": torch.randn(13, 7),
    "vector": torch.randn(11).bfloat16(),
    "cube": torch.randint(0, 100, (4, 3, 5)),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
}
SLICES = {
    "matrix": [
        (),
        (slice(2, 9),),
        (slice(0, 13), slice(3, 7)),
        (slice(12, 20), slice(0, 1)),
        (slice(5, 5), slice(1, 2)),
    ],
    "vector": [(), (slice(4, 11),)],
    "cube": [(), (slice(1, 3), slice(0, 2)), (slice(1, 4), slice(0, 3), slice(2, 4))],
    "scalar": [()],
    "empty": [(), (slice(0, 0), slice(1, 2))],
}


@pytest.mark.parametrize("block_bytes", [1, 60, 1 << 20])
def test_slices_are_those_of_the_tensor(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(weight_files, "BLOCK_BYTES", block_bytes)
    save_file(TENSORS, tmp_path / "model.safetensors")
    stored = WeightFiles(tmp_path).tensors
    for name, tensor in TENSORS.items():
        assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tuple(tensor.shape))
        for index in SLICES[name]:
            assert torch.equal(stored[name][index], tensor[index]), (name, index)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"model.safetensors: tensor 'matrix': the file ends early \(copy"):
        files.read("matrix")
