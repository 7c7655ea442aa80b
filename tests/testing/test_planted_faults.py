"""Start here when verify does not name a fault that is planted, or a new axis has no faults in the table."""

from typing import Any

import pytest

import fused_megatron as fm
from fused_megatron.planning.verify.config_check import verify_config
from fused_megatron.planning.verify.layout_parts import NEEDS
from fused_megatron.planning.verify.planted import conclusion, verify_planted
from fused_megatron.testing.planted_faults import FAULTS, Fault, fault

# One of a run, one of a module; the others need minutes.
FAST = {"averaged over replicas", "bias on every rank"}


def without_fault(planted: Fault) -> Any:
    if planted.config is not None:
        return verify_config(planted.config)
    assert planted.build_model is not None
    return fm.verify(planted.build_model, {"tp": 2}, planted.batch)


def some_slow(names: Any) -> list[Any]:
    return [pytest.param(n, marks=() if n in FAST else pytest.mark.slow, id=n.replace(" ", "-")) for n in names]


@pytest.mark.parametrize("name", some_slow(each.name for each in FAULTS))
def test_a_planted_fault_is_caught_and_named(name: str) -> None:
    planted = fault(name)
    result = verify_planted(planted)
    (layout,) = result.layouts
    assert conclusion(planted, result)[1]
    assert not result and layout.error is None
    first = result.first_difference
    assert planted.is_named_by(first.described), result.table()
    assert (layout.cause.parts, layout.cause.together) == ((planted.axis,), False), result.table()
    # Far beyond what rounding could be: nobody has to wonder.
    assert not first.error < 10 * first.allowed, result.table()


def distinct() -> list[Fault]:
    """One fault for each run or module that shows some."""
    found: dict[Any, Fault] = {}
    for each in FAULTS:
        found.setdefault((each.config, each.build_model), each)
    return list(found.values())


@pytest.mark.parametrize("name", some_slow(each.name for each in distinct()))
def test_the_same_layout_without_the_fault_is_right(name: str) -> None:
    result = without_fault(fault(name))
    assert result, result.table()


def test_the_table_has_a_fault_of_each_part_and_each_name_once() -> None:
    names = [each.name for each in FAULTS]
    assert len(set(names)) == len(names) >= 20
    axes = {each.axis for each in FAULTS}
    assert axes == set(NEEDS)
