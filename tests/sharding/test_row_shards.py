"""Start here when ranks that share a parameter own the wrong rows, or say the wrong place of them."""

import pytest
import torch

from fused_megatron.sharding import WHOLE_ROWS, ParameterShard, RowShards, ShardPart, mark_shard


@pytest.mark.parametrize("shape", [(7, 3), (2, 5), (8,), (1, 4), (0, 3), ()], ids=str)
@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_every_row_has_one_owner(shape: tuple[int, ...], num_shards: int) -> None:
    tensor = torch.randn(shape)
    owned = [RowShards(num_shards, index).own(tensor) for index in range(num_shards)]
    assert torch.equal(torch.cat([part.reshape(-1) for part in owned]), tensor.reshape(-1))
    assert all(part.shape[1:] == shape[1:] for part in owned)
    largest = max((part.shape[0] if part.dim() else 1) for part in owned)
    assert largest == RowShards(num_shards).rows_per_shard(shape)


def test_own_rows_are_a_view() -> None:
    tensor, scalar = torch.zeros(5, 2), torch.zeros(())
    RowShards(2, 1).own(tensor).fill_(1)
    RowShards(2, 0).own(scalar).fill_(1)
    assert tensor.sum(1).tolist() == [0, 0, 0, 2, 2] and scalar.item() == 1
    assert RowShards(2, 1).own(scalar).shape == (0,)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
def test_parts_of_own_rows_fill_the_full_tensors(num_shards: int) -> None:
    """A parameter that stacks two shards, one with rows of padding: every real element of both once."""
    local = torch.arange(9.0 * 2).view(9, 2)
    parameter = torch.nn.Parameter(local.clone())
    gate = ParameterShard((10, 2), (5, 0))  # rows 5 to 9 of 10
    up = ParameterShard((7, 2), (4, 0))  # rows 4 to 6 of 7, and a row of padding
    mark_shard(parameter, (ShardPart("gate", slice(0, 5), gate), ShardPart("up", slice(5, 9), up)))
    full = {"gate": torch.full((10, 2), torch.nan), "up": torch.full((7, 2), torch.nan)}
    for index in range(num_shards):
        rows = RowShards(num_shards, index)
        for part in rows.own_parts(parameter):
            box = part.held(rows.own(local))
            target = full[part.name][box.box.slices()]
            assert bool(target.isnan().all()), "owned twice"
            target.copy_(box.tensor)
    assert torch.equal(full["gate"][5:], local[:5]) and bool(full["gate"][:5].isnan().all())
    assert torch.equal(full["up"][4:], local[5:8]) and bool(full["up"][:4].isnan().all())


def test_one_shard_is_the_whole_parameter() -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    (part,) = WHOLE_ROWS.own_parts(parameter)
    assert part.of(parameter).shape == (3, 2) and part.held(parameter).offset == (0, 0)
    scalar = torch.nn.Parameter(torch.tensor(2.0))
    assert [RowShards(2, i).own_parts(scalar) != () for i in (0, 1)] == [True, False]
