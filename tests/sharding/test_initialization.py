"""Start here when a model's initial weights differ between layouts."""

import hashlib

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from fused_megatron.checks import InputError
from fused_megatron.sharding import Box, ParameterShard, fill_normal_shard_, initialization, mark_shard


def drawn(shape, *, full=None, offset=None, std=1.0, seed=1, name="w", dtype=torch.float32):
    parameter = torch.nn.Parameter(torch.full(shape, torch.nan, dtype=dtype))
    if full is not None:
        mark_shard(parameter, ParameterShard(full, offset))
    fill_normal_shard_(parameter, std, seed=seed, name=name)
    return parameter.detach()


@pytest.mark.parametrize("full_shape", [(600, 520), (7, 3), (256, 512), (1, 1030)])
def test_shards_are_parts_of_the_full_weight(full_shape):
    full = drawn(full_shape)
    rows, columns = full_shape
    for first, last in [(0, rows // 2), (rows // 2, rows), (rows // 3, rows // 3 + 1)]:
        assert torch.equal(drawn((last - first, columns), full=full_shape, offset=(first, 0)), full[first:last])
    for first, last in [(0, columns // 2), (columns // 2, columns)]:
        assert torch.equal(drawn((rows, last - first), full=full_shape, offset=(0, first)), full[:, first:last])


def test_padding_rows_are_zero():
    full = drawn((300, 5))
    padded = drawn((192, 5), full=(300, 5), offset=(192, 0))
    assert torch.equal(padded[:108], full[192:]) and not padded[108:].any()
    assert not drawn((192, 5), full=(300, 5), offset=(384, 0)).any()


def test_moments_and_independence():
    full = drawn((800, 700), std=0.02)
    assert abs(full.mean()) < 1e-4 and abs(full.std() - 0.02) < 1e-4
    tiles = torch.stack([full[:256, :256], full[256:512, :256], full[:256, 256:512]]).flatten(1)
    assert (torch.corrcoef(tiles) - torch.eye(3)).abs().max() < 0.02
    assert torch.equal(full, drawn((800, 700), std=0.02))
    for other in (drawn((800, 700), std=0.02, seed=2), drawn((800, 700), std=0.02, name="v")):
        assert abs(torch.corrcoef(torch.stack([full.flatten(), other.flatten()]))[0, 1]) < 0.01


def test_dtype_rounds_the_same_values():
    assert torch.equal(drawn((9, 9), dtype=torch.bfloat16), drawn((9, 9)).bfloat16())
    assert torch.equal(drawn((9,), dtype=torch.float64), drawn((9,)).double())


def test_values_stay_what_they_were():
    """Other values would change the model of every old seed."""
    torch.testing.assert_close(
        drawn((2, 2), seed=1234, name="blocks.0.attention.projection.weight").flatten(),
        torch.tensor([-0.434817, -0.464131, 0.154257, 0.456436]),
    )


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_weight_of_three_dims_is_the_concatenation_of_its_shards(dim):
    full_shape = (4, 300, 520)  # experts, F, H
    full = drawn(full_shape)
    for ranks in (2, 4):
        shards = []
        for rank in range(ranks):
            shape, offset = list(full_shape), [0, 0, 0]
            shape[dim] //= ranks
            offset[dim] = rank * shape[dim]
            shards.append(drawn(shape, full=full_shape, offset=tuple(offset)))
        assert torch.equal(torch.cat(shards, dim), full)
    assert abs(full.mean()) < 5e-3 and abs(full.std() - 1) < 5e-3
    assert (torch.corrcoef(full.flatten(1)) - torch.eye(4)).abs().max() < 0.02


def test_no_dims_and_four_are_refused():
    for shape in ((), (2, 2, 2, 2)):
        with pytest.raises(InputError, match="1 to 3 dims"):
            drawn(shape)


def test_meta():
    parameter = torch.empty(3, 3, device="meta")
    fill_normal_shard_(parameter, 1.0, seed=0, name="w")


class OnADevice(torch.Tensor):
    """Tensor of a stand-in device, whose values lie in host memory; it counts the copies from the host to it.

    The device is torch's "lazy" one, since every build of torch lets a tensor subclass name it.
    """

    copies = 0

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="lazy"
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not all(isinstance(x, OnADevice) for x in tensors):
            assert func is torch.ops.aten.copy_.default and args[0].dtype == args[1].dtype and args[2]
            OnADevice.copies += 1
        inner = tree_map(lambda x: x.inner if isinstance(x, OnADevice) else x, (args, kwargs or {}))
        return tree_map(lambda x: OnADevice(x) if isinstance(x, torch.Tensor) else x, func(*inner[0], **inner[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "most", "copies"),
    [
        ((600, 520), 1 << 24, 1),
        ((1100, 520), 310_000, 2),
        ((1030,), 600, 2),
        ((3, 300, 520), 160_000, 3),
        ((3, 300, 520), 140_000, 6),
    ],
)
def test_a_device_gets_the_same_values_in_few_copies(shape, most, copies, dtype, monkeypatch):
    """A copy a tile would be 52,000 copies for a rank of a 7B model, and each would make the host wait."""
    monkeypatch.setattr(initialization, "MOST_STAGED", most)
    monkeypatch.setattr(OnADevice, "copies", 0)
    parameter = OnADevice(torch.full(shape, torch.nan, dtype=dtype))
    fill_normal_shard_(parameter, 0.02, seed=3, name="w")
    assert OnADevice.copies == copies
    assert torch.equal(parameter.inner, drawn(shape, std=0.02, seed=3, dtype=dtype))


def test_pieces_are_cut_at_the_edges_of_tiles():
    for box in (Box((130, 70), (900, 1400)), Box((2, 0, 100), (5, 300, 700)), Box((77,), (4000,)), Box((0, 0), (0, 9))):
        for most in (1, 100_000, 1 << 24):
            pieces = list(initialization._pieces(box, most))
            assert sum(piece.volume for piece in pieces) == box.volume
            tiles = (1, 256, 256)[-len(box.shape) :]
            for piece in pieces:
                assert piece.intersect(box) == piece or not box.volume
                spans = zip(piece.offset, piece.shape, tiles, strict=True)
                one_tile = all(start // edge == (start + size - 1) // edge for start, size, edge in spans)
                assert piece.volume <= most or one_tile
                for dim, edge in enumerate(tiles):
                    ends = (box.offset[dim], box.offset[dim] + box.shape[dim])
                    for cut in (piece.offset[dim], piece.offset[dim] + piece.shape[dim]):
                        assert cut in ends or cut % edge == 0


def test_threads_draw_the_same_values():
    parameters = [torch.empty(700, 900) for _ in range(2)]
    for parameter, threads in zip(parameters, (1, 3), strict=True):
        initialization._draw(parameter.numpy(), Box((100, 30), (700, 900)), 1.0, 1, "w", threads)
    assert torch.equal(*parameters)


def test_all_bits_stay_what_they_were():
    digest = hashlib.sha256()
    for shape, dtype in (((700, 300), torch.float32), ((3, 260, 10), torch.bfloat16), ((1000,), torch.float32)):
        digest.update(drawn(shape, std=0.02, seed=7, name="blocks.3.w", dtype=dtype).float().numpy().tobytes())
    assert digest.hexdigest() == "badf3266b6f8a325b57e38635b4fbc359a3a2e4f9ed7c9a065a45b5455c145af"


def test_the_memory_of_a_weight_can_be_resized_afterwards():
    """As sharded weights do: torch refuses it for memory that numpy has seen."""
    for dtype in (torch.float32, torch.bfloat16):
        drawn((5, 5), dtype=dtype).untyped_storage().resize_(0)
