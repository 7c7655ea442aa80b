"""Start here when an AdamW update is not torch's, or depends on where in a tensor an element stands."""

import math
from typing import Any

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.ops import adamw
from fused_megatron.reference.adamw import adamw_ as reference

FACTORS = {"lr": 1e-2, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.3}
Lists = dict[str, list[torch.Tensor]]


def lists_of(shapes: list[tuple[int, ...]], low: torch.dtype | None = None, seed: int = 0) -> Lists:
    generator = torch.Generator().manual_seed(seed)
    made: Lists = {
        name: [torch.randn(shape, generator=generator) for shape in shapes] for name in ("main", "exp_avg", "gradient")
    }
    made["exp_avg_sq"] = [torch.randn(shape, generator=generator).square() for shape in shapes]
    made["low"] = [] if low is None else [weight.to(low) for weight in made["main"]]
    return made


def copied(lists: Lists) -> Lists:
    return {name: [tensor.clone() for tensor in tensors] for name, tensors in lists.items()}


def update(lists: Lists, **changes: Any) -> None:
    given = {"step": 3, **FACTORS, **changes}
    adamw.adamw_(*(lists[name] for name in ("main", "exp_avg", "exp_avg_sq", "gradient")), low=lists["low"], **given)


def exact(lists: Lists, scale: float, step: int) -> dict[str, list[torch.Tensor]]:
    """The update in float64, from the formula of the paper."""
    found: Lists = {"main": [], "exp_avg": [], "exp_avg_sq": []}
    for w, m, v, g in zip(*(lists[name] for name in ("main", "exp_avg", "exp_avg_sq", "gradient")), strict=True):
        wide = g.double() * scale
        first = FACTORS["beta1"] * m.double() + (1 - FACTORS["beta1"]) * wide
        second = FACTORS["beta2"] * v.double() + (1 - FACTORS["beta2"]) * wide.square()
        mean, variance = first / (1 - FACTORS["beta1"] ** step), second / (1 - FACTORS["beta2"] ** step)
        decayed = w.double() * (1 - FACTORS["lr"] * FACTORS["weight_decay"])
        found["main"].append(decayed - FACTORS["lr"] * mean / (variance.sqrt() + FACTORS["eps"]))
        found["exp_avg"].append(first)
        found["exp_avg_sq"].append(second)
    return found


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shapes", [[(7, 5), (3,), (), (0, 4), (1, 33)], [(129, 67)], [(5,)] * 70 + [(4100,)]], ids=str)
def test_update_is_adamw_in_float64_and_the_reference_bit_for_bit(
    shapes: list[tuple[int, ...]], low: torch.dtype | None
) -> None:
    lists = lists_of(shapes, low)
    wanted, plain = exact(lists, 0.37, 3), copied(lists)
    update(lists, gradient_scale=0.37)
    for name, tensors in wanted.items():
        for found, value in zip(lists[name], tensors, strict=True):
            torch.testing.assert_close(found.double(), value, rtol=4e-7, atol=4e-7)
    assert all(torch.equal(x, w.to(x.dtype)) for x, w in zip(lists["low"], lists["main"], strict=low is not None))
    names = ("main", "exp_avg", "exp_avg_sq", "gradient", "low")
    reference(*(plain[name] for name in names), torch.tensor(0.37), None, *FACTORS.values(), 3, False)
    assert all(torch.equal(x, y) for name in names for x, y in zip(lists[name], plain[name], strict=True))


def test_update_is_within_an_ulp_of_torchs() -> None:
    lists = lists_of([(64, 65)])
    parameter = torch.nn.Parameter(lists["main"][0].clone())
    parameter.grad = lists["gradient"][0].clone()
    theirs = torch.optim.AdamW(
        [parameter], lr=FACTORS["lr"], betas=(0.8, 0.95), eps=FACTORS["eps"], weight_decay=0.3, fused=True
    )
    moments = {name: lists[name][0].clone() for name in ("exp_avg", "exp_avg_sq")}
    theirs.state[parameter] = {"step": torch.tensor(2.0), **moments}
    theirs.step()
    before = lists["main"][0].clone()
    update(lists)
    # Of the largest of three numbers: the new weight is the difference of the other two.
    weight = parameter.detach()
    largest = torch.stack([before.abs(), weight.abs(), (weight - before).abs()]).amax(0)
    ulp = torch.exp2(torch.floor(torch.log2(largest)) - 23)
    distance = (lists["main"][0] - weight).abs() / ulp
    # torch computes the first moment with a fused multiply-add, where the processor has one.
    assert distance.max() <= 2 and (distance > 1).float().mean() < 1e-3


@pytest.mark.parametrize("cut", [1, 3, 4, 17])
def test_an_element_does_not_depend_on_its_neighbours(cut: int) -> None:
    """Bits of a tensor updated in two parts, the second of them unaligned, are the bits of one update."""
    whole = lists_of([(203,)], torch.bfloat16)
    parts = {name: [tensors[0][:cut], tensors[0][cut:]] for name, tensors in copied(whole).items()}
    update(whole)
    update(parts)
    for name, tensors in whole.items():
        assert torch.equal(torch.cat(parts[name]), tensors[0])


def test_scale_and_skip_are_read_from_tensors_and_gradients_are_zeroed() -> None:
    by_number, by_tensor = lists_of([(9, 5)]), lists_of([(9, 5)])
    update(by_number, gradient_scale=0.25)
    update(by_tensor, gradient_scale=torch.tensor(0.25), skip=torch.tensor(False), zero_gradient=True)
    assert torch.equal(by_number["main"][0], by_tensor["main"][0]) and not by_tensor["gradient"][0].any()
    before = copied(by_tensor)
    update(by_tensor, skip=torch.tensor(True), zero_gradient=True)
    assert all(torch.equal(x, y) for name in before for x, y in zip(before[name], by_tensor[name], strict=True))


def test_extreme_gradients() -> None:
    lists = lists_of([(8,)])
    lists["exp_avg_sq"][0].zero_()
    lists["exp_avg"][0].zero_()
    lists["gradient"][0].copy_(torch.tensor([0.0, 1e-30, -1e-30, 1e18, -1e18, 1e-12, math.inf, math.nan]))
    before = lists["main"][0].clone()
    update(lists, step=1, weight_decay=0.0)
    change = lists["main"][0] - before
    assert change[0] == 0 and change[6:].isnan().all()
    torch.testing.assert_close(change[3:5], torch.tensor([-1e-2, 1e-2]), rtol=1e-4, atol=0)


def test_versions_are_counted_and_the_schema_holds() -> None:
    lists = lists_of([(4, 3), (5,)], torch.bfloat16)
    versions = [tensor._version for tensors in lists.values() for tensor in tensors]
    update(lists)
    assert all(t._version > v for (t, v) in zip([t for ts in lists.values() for t in ts], versions, strict=True))
    names = ("main", "exp_avg", "exp_avg_sq", "gradient", "low")
    arguments = (*(lists[name] for name in names), torch.tensor(1.0), None, *FACTORS.values(), 3, True)
    torch.library.opcheck(
        torch.ops.fused_megatron.adamw_.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0}, "step=0 must be 1 or more"),
        ({"exp_avg": []}, "exp_avg has 0 tensors, main has 1: one for each"),
        ({"gradient": [torch.zeros(3)]}, r"gradient\[0\]\.shape=\(3,\) must be \(4, 3\)"),
        ({"main": [torch.zeros(4, 3).double()]}, r"main\[0\] must be a contiguous tensor of float32, got float64"),
        (
            {"exp_avg_sq": [torch.zeros(3, 4).t()]},
            r"exp_avg_sq\[0\] must be a contiguous tensor of float32, got float32",
        ),
        ({"low": [torch.zeros(4, 3)]}, r"low\[0\] must be a contiguous tensor of bfloat16 or float16, got float32"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_written(change: dict[str, Any], message: str) -> None:
    lists = lists_of([(4, 3)])
    options = {name: change.pop(name) for name in ("step",) if name in change}
    lists |= change
    before = copied(lists)
    with pytest.raises(InputError, match=message):
        update(lists, **options)
    assert all(torch.equal(x, y) for name in before for x, y in zip(before[name], lists[name], strict=True))


def test_no_tensors_are_no_work() -> None:
    update(lists_of([]))
