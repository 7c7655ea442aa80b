"""Start here when the activation of experts gives a wrong value or gradient, or refuses an input."""

import pytest
import torch
import torch.nn.functional as F

from fused_megatron import ops
from fused_megatron.checks import InputError
from fused_megatron.ops import weighted_swiglu
from fused_megatron.ops.weighted_swiglu import weighted_swiglu_gradients
from fused_megatron.testing.op_contract import CLAUSES, CPU_CLAUSES, Contract
from fused_megatron.testing.op_gradients import assert_op_matches, output_and_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


def unfused(x, weight):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up * weight.unsqueeze(1).to(x.dtype)


def draw(shape, dtype):
    """Return x [N, 2F] and weight [N], and dy [N, F]; shape is the shape of dy."""
    generator = torch.Generator().manual_seed(0)
    rows, width = shape
    x = 2 * torch.randn(rows, 2 * width, generator=generator)
    weight = torch.rand(rows, generator=generator).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return (x.to(dtype), weight), torch.randn(rows, width, generator=generator).to(dtype)


CONTRACT = Contract(
    weighted_swiglu, unfused, draw, shape=(7, 52), odd=(3, 6), empty=((0, 8), (4, 0)), streamed=(4200, 512)
)


@pytest.mark.parametrize("clause", CLAUSES)
def test_contract(clause, device):
    CONTRACT.check(clause, device)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("clause", CPU_CLAUSES)
def test_contract_on_the_cpu(clause):
    CONTRACT.check(clause)


# Widths that are wide and aligned; too odd for wide accesses; one column; several chunks and blocks of rows.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 8), (70, 264), (33, 257), (3, 1), (90, 11), (4, 1036), (2, 2100)])
def test_values_and_gradients(shape, dtype, device):
    (x, weight), dy = draw(shape, dtype)
    assert_op_matches(weighted_swiglu, unfused, (x.to(device), weight.to(device)), dy.to(device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(12, 520), (9, 33)])
def test_gradients_with_the_output(shape, dtype, device):
    """The same bits as forward and backward apart."""
    (x, weight), dy = draw(shape, dtype)
    x, weight, dy = x.to(device), weight.to(device), dy.to(device)
    y, dx, dweight = output_and_gradients(weighted_swiglu, (x, weight), dy)
    for actual, expected in zip(weighted_swiglu_gradients(dy, x, weight), (dx, dweight, y), strict=True):
        assert torch.equal(actual, expected)


def test_gradients_with_the_output_in_float64():
    (x, weight), dy = draw((4, 6), torch.float64)
    y, dx, dweight = output_and_gradients(unfused, (x, weight), dy)
    for actual, expected in zip(weighted_swiglu_gradients(dy, x, weight), (dx, dweight, y), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_one_give_swiglu(dtype, device):
    (x, _), _ = draw((6, 40), dtype)
    assert torch.equal(weighted_swiglu(x.to(device), torch.ones(6, device=device)), ops.bias_swiglu(x.to(device)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_row(dtype, device):
    x = torch.ones(5, 16, dtype=dtype, device=device)
    x[1, 3], x[2, 9], weight = NAN, INF, torch.tensor([1.0, 1.0, 1.0, NAN, 2.0], device=device)
    y, dx, dweight = output_and_gradients(weighted_swiglu, (x, weight), torch.ones(5, 8, dtype=dtype, device=device))
    assert y.isfinite().all(1).tolist() == [True, False, False, False, True]
    assert dx.isfinite().all(1).tolist() == [True, False, False, False, True]
    assert dweight.isfinite().tolist() == [True, False, False, True, True]


def test_bad_arguments(device):
    x, weight = torch.zeros(3, 4, device=device), torch.zeros(3, device=device)
    with pytest.raises(InputError, match=r"x.shape=\(3, 3\) must be \[rows, 2 F\]"):
        weighted_swiglu(x[:, :3], weight)
    with pytest.raises(InputError, match=r"x.shape=\(4,\) must be"):
        weighted_swiglu(x[0], weight)
    with pytest.raises(InputError, match=r"weight.shape=\(2,\) must be \(3,\)"):
        weighted_swiglu(x, weight[:2])
    with pytest.raises(TypeError, match=r"weight.dtype=bfloat16 must be one of: float32"):
        weighted_swiglu(x, weight.bfloat16())
    with pytest.raises(TypeError, match=r"x.dtype=int64"):
        weighted_swiglu(x.long(), weight)
    with pytest.raises(InputError, match="device"):
        weighted_swiglu(x, weight.to("meta"))
    with pytest.raises(RuntimeError, match="dy must be"):
        torch.ops.fused_megatron.weighted_swiglu_backward(x, x, weight, False)
