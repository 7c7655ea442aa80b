"""Start here when a model's initial weights differ between layouts."""

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.sharding import ParameterShard, fill_normal_shard_, mark_shard


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
