"""Start here when an experiment says that a trend holds, and its numbers say otherwise."""

import pytest

from fused_megatron.checks import InputError
from fused_megatron.experiments.catalogue import Statement
from fused_megatron.experiments.trend_checks import judge

SIZES = {"a": {"dp": 1.0}, "b": {"dp": 2.0}, "c": {"dp": 4.0}}


def verdict(kind: str, values: list[float], formula: str = "", tolerance: float = 0.0, slack: float = 0.0) -> bool:
    statement = Statement("text", "state", kind, formula, tolerance, slack)  # type: ignore[arg-type]
    measured = {name: {"state": value} for name, value in zip(SIZES, values, strict=True)}
    return judge(statement, SIZES, measured).holds


@pytest.mark.parametrize(
    ("kind", "formula", "right", "wrong"),
    [
        ("equals", "6 + 12 / dp", [18, 12, 9], [18, 12, 9.1]),
        ("proportional", "1 / dp", [40, 20, 10], [40, 20, 11]),
        ("at_most", "12 / dp", [12, 5, 3], [12, 6.1, 3]),
        ("order", "", [1, 2, 3], [1, 3, 3]),
    ],
)
def test_each_kind_of_statement_finds_a_wrong_value(
    kind: str, formula: str, right: list[float], wrong: list[float]
) -> None:
    assert verdict(kind, right, formula)
    assert not verdict(kind, wrong, formula)


def test_a_tolerance_is_a_share_of_the_value() -> None:
    assert verdict("equals", [18.1, 12, 9], "6 + 12 / dp", 0.01)
    assert not verdict("equals", [18.3, 12, 9], "6 + 12 / dp", 0.01)
    assert not verdict("order", [1, 1.05, 2], tolerance=0.1)


def test_a_slack_is_in_the_unit_of_the_value() -> None:
    assert verdict("equals", [18.4, 12, 9], "6 + 12 / dp", slack=0.5)
    assert not verdict("equals", [18.6, 12, 9], "6 + 12 / dp", slack=0.5)
    assert verdict("at_most", [18.4, 1, 1], "6 + 12 / dp", slack=0.5)
    assert not verdict("at_most", [18.6, 1, 1], "6 + 12 / dp", slack=0.5)


def test_a_statement_about_some_runs_ignores_the_others() -> None:
    measured = {"a": {"state": 99.0}, "b": {"state": 12.0}, "c": {"state": 9.0}}
    checked = judge(Statement("text", "state", formula="6 + 12 / dp", cases=("b", "c")), SIZES, measured)
    assert checked.holds and [(p.case, p.predicted, p.measured) for p in checked.points] == [
        ("b", 12, 12),
        ("c", 9, 9),
    ]


def test_a_figure_that_no_run_has_is_an_error() -> None:
    with pytest.raises(InputError, match="quantity='states' must be one of state"):
        judge(Statement("text", "states", formula="1"), SIZES, {name: {"state": 1.0} for name in SIZES})
