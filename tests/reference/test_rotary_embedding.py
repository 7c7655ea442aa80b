"""Start here when rotary_embedding goes wrong without the compiled library."""

import pytest
import torch

from fused_megatron.reference import rotary_embedding as reference


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_is_complex_multiplication_and_back(dtype, interleaved):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 3, 10, generator=generator).to(dtype)
    angle = torch.randn(5, 4, generator=generator).double()
    wide = x[..., :8].double()
    pairs = wide.unflatten(-1, (4, 2)) if interleaved else wide.unflatten(-1, (2, 4)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    back = torch.view_as_real(turned)
    exact = back.flatten(-2) if interleaved else back.transpose(-1, -2).flatten(-2)
    arguments = (angle.cos().to(dtype), angle.sin().to(dtype), None, None, None, 0, 0, interleaved)
    y, nothing = reference.rotary_embedding_forward(x, None, *arguments, False)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y[..., :8].double(), exact, rtol=tolerance, atol=tolerance)
    assert torch.equal(y[..., 8:], x[..., 8:]) and y.dtype == dtype and nothing.numel() == 0
    again, k = reference.rotary_embedding_forward(y, y, *arguments, True)
    torch.testing.assert_close(again, x, rtol=tolerance, atol=tolerance)
    assert torch.equal(k, again)


def test_positions_of_tokens():
    def positions(*shape, sequence_dim=0, start=0, **tensors):
        values = (tensors.get(name) for name in ("positions", "offset", "cu_seqlens"))
        return reference.token_positions(torch.Size(shape), torch.device("cpu"), *values, start, sequence_dim).tolist()

    assert positions(3, 2, 1, 8, start=4) == [[4, 4], [5, 5], [6, 6]]
    assert positions(2, 3, 1, 8, sequence_dim=1, start=4) == [[4, 5, 6], [4, 5, 6]]
    assert positions(2, 2, 1, 8, offset=torch.tensor([10, 20])) == [[10, 20], [11, 21]]
    assert positions(2, 2, 1, 8, sequence_dim=1, offset=torch.tensor([10, 20])) == [[10, 11], [20, 21]]
    assert positions(2, 2, 1, 8, positions=torch.tensor([7, 3])) == [[7, 7], [3, 3]]
    cu_seqlens = torch.tensor([1, 3, 3, 6], dtype=torch.int32)
    assert positions(7, 1, 8, cu_seqlens=cu_seqlens) == [-1, 0, 1, 0, 1, 2, -1]
    assert positions(7, 1, 8, cu_seqlens=cu_seqlens, offset=torch.tensor([10, 20, 30])) == [-1, 10, 11, 30, 31, 32, -1]


def test_a_position_without_a_row_is_nan():
    x = torch.randn(3, 1, 1, 6)
    for rows, bad in ((2, [2]), (0, [0, 1, 2])):
        tables = torch.ones(rows, 2), torch.zeros(rows, 2)
        y, _ = reference.rotary_embedding_forward(x, None, *tables, None, None, None, 0, 0, False, False)
        assert y[..., :4].isnan().all(-1).flatten().nonzero().flatten().tolist() == bad
        assert torch.equal(y[..., 4:], x[..., 4:])
