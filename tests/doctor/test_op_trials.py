"""Start here when the doctor calls a right kernel wrong, or a wrong one right."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_megatron import ops
from fused_megatron.doctor.installation import find_library
from fused_megatron.doctor.op_trials import BARS, TRIALS, Trial, try_ops

CPU = torch.device("cpu")
GELU = next(trial for trial in TRIALS if trial.op == "bias_gelu")


def test_every_op_with_kernels_has_a_trial() -> None:
    only_in_models = ["rotary_query_key_value", "vocab_embedding"]
    public = [op.op for op in find_library(True, None).ops]
    assert sorted(trial.op for trial in TRIALS) == sorted(public + only_in_models)


def test_the_kernels_of_the_cpu_are_right() -> None:
    found = try_ops(CPU)
    assert {trial.op: trial.problem for trial in found if trial.problem} == {}
    # Not compared with themselves: a comparison in the same dtype by the same kernel has no error.
    exact = [trial.op for trial in found if trial.error == 0]
    assert exact == ["order_by_expert"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_of_a_gpu_are_right() -> None:
    assert {trial.op: trial.problem for trial in try_ops(torch.device("cuda")) if trial.problem} == {}


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return dy * 1.05


def one_element_off(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y = ops.bias_gelu(x, bias).clone()
    y[-1, -1] += 3.0
    return y


def not_a_number(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return ops.bias_gelu(x, bias) * torch.tensor(float("nan"))


def raising(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nsecond line")


def wrong_gradient(x: torch.Tensor, bias: torch.Tensor) -> Any:
    return WrongGradient.apply(ops.bias_gelu(x, bias))


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (one_element_off, "its results in bfloat16 are off by"),
        (not_a_number, "its results in bfloat16 are off by nan"),
        (wrong_gradient, "its results in bfloat16 are off by 5"),
        (raising, "CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_wrong_kernel_is_named(call: Callable[..., Any], problem: str) -> None:
    trial = dataclasses.replace(GELU, call=call, right=ops.bias_gelu)
    (found,) = try_ops(CPU, [trial])
    assert found.op == "bias_gelu" and found.problem is not None
    assert problem in found.problem and "\n" not in found.problem


def test_one_wrong_index_is_an_error() -> None:
    def wrong(experts: torch.Tensor) -> list[torch.Tensor]:
        places = ops.order_by_expert(experts.view(-1, 1), 4).places.clone()
        places[0] += 1
        return [places]

    right = next(trial for trial in TRIALS if trial.op == "order_by_expert")
    (found,) = try_ops(CPU, [Trial("order_by_expert", wrong, right.draw, right=right.call, has_gradient=False)])
    assert found.problem is not None and "inf" in found.problem


def test_bars_lie_between_rounding_and_wrong_results() -> None:
    for dtype, bar in BARS.items():
        assert 1 < bar / torch.finfo(dtype).eps < 100
