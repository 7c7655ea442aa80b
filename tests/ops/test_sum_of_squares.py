"""Start here when a sum of squares is inaccurate, or differs between two calls or between cuts of the same elements."""

from collections.abc import Sequence

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.ops import sum_of_squares

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensors_of(sizes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def exact(tensors: Sequence[torch.Tensor]) -> float:
    return sum(tensor.double().square().sum().item() for tensor in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [[(), (3, 5), (0, 4), (33,)], [(8191,), (8192,), (8193,)], [(129, 130)]], ids=str)
def test_the_sum_is_exact_to_the_bits_of_float64(sizes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    tensors = tensors_of(sizes, dtype)
    found = sum_of_squares(tensors)
    assert found.dtype == torch.float64 and found.shape == ()
    assert found.item() == pytest.approx(exact(tensors), rel=1e-14)


def test_more_tensors_than_one_launch_takes() -> None:
    tensors = tensors_of([(i % 7,) for i in range(400)])
    assert sum_of_squares(tensors).item() == pytest.approx(exact(tensors), rel=1e-14)


@pytest.mark.parametrize("cut", [1, 4, 8195])
def test_float32_does_not_show_how_the_elements_are_cut(cut: int) -> None:
    """The second part is unaligned."""
    (whole,) = tensors_of([(16385,)])
    found = [sum_of_squares(parts).sqrt() for parts in ([whole], [whole[:cut], whole[cut:]])]
    assert torch.equal(found[0].float(), found[1].float())


def test_the_bits_depend_neither_on_the_call_nor_on_the_address() -> None:
    (whole,) = tensors_of([(8193,)])
    aligned, shifted = whole.clone(), torch.empty(8194)[1:].copy_(whole)
    first = sum_of_squares([aligned])
    assert torch.equal(first, sum_of_squares([aligned])) and torch.equal(first, sum_of_squares([shifted]))


def test_extreme_numbers_and_strides() -> None:
    # In float32 these squares are 0 or inf.
    assert sum_of_squares([torch.tensor([3e-30, 4e-30])]).sqrt().item() == pytest.approx(5e-30, rel=1e-6)
    assert sum_of_squares([torch.tensor([3e30]), torch.tensor([4e30])]).sqrt().item() == pytest.approx(5e30, rel=1e-6)
    (matrix,) = tensors_of([(6, 7)])
    for view in (matrix.t(), matrix[:, ::2], torch.nn.Parameter(matrix)):
        found = sum_of_squares([view])
        assert found.item() == pytest.approx(exact([view]), rel=1e-14) and not found.requires_grad


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_reaches_the_sum(fault: float) -> None:
    tensors = tensors_of([(5,), (9000,), (3,)])
    tensors[1][8999] = fault
    assert not sum_of_squares(tensors).isfinite()


def test_no_tensors_are_zero() -> None:
    assert torch.equal(sum_of_squares([]), torch.zeros((), dtype=torch.float64))


def test_the_schema_holds() -> None:
    utilities = ("test_schema", "test_faketensor")
    op = torch.ops.fused_megatron.sum_of_squares.default
    torch.library.opcheck(op, (tensors_of([(3, 4), (5,)]),), test_utils=utilities)


def test_bad_input_is_refused() -> None:
    with pytest.raises(TypeError, match=r"tensors\[1\]\.dtype=int64 must be one of: float32, bfloat16"):
        sum_of_squares([torch.zeros(2), torch.zeros(2, dtype=torch.int64)])
    with pytest.raises(InputError, match=r"tensors\[1\]\.device=meta must equal tensors\[0\]\.device=cpu"):
        sum_of_squares([torch.zeros(2), torch.zeros(2, device="meta")])
