"""Checks of the statements of an experiment against its measurements."""

import math
from collections.abc import Mapping
from itertools import pairwise

from fused_megatron.benchmarking.report.experiment_results import CheckedStatement, Point
from fused_megatron.checks import InputError
from fused_megatron.experiments.catalogue import Statement
from fused_megatron.experiments.formulas import evaluate

TIMED = {"step_ms", "free_ms", "exposed_ms", "bubble"}
"""Figures that depend on the load of the machine: no test asserts them."""
# Rounding of a formula in float64.
_EXACT = 1e-9


def judge(
    statement: Statement,
    sizes: Mapping[str, Mapping[str, float]],
    measured: Mapping[str, Mapping[str, float]],
) -> CheckedStatement:
    """Compare the measurements of the runs with a statement.

    Args:
        statement: of the experiment.
        sizes: names of formulas, by run.
        measured: figures, by run.

    Raises:
        InputError: a formula that cannot be computed; a figure that no run has.
    """
    names = statement.cases or tuple(measured)
    values = {name: measured[name].get(statement.quantity, 0.0) for name in names}
    if not any(statement.quantity in measured[name] for name in names):
        known = sorted({each for name in names for each in measured[name]})
        raise InputError(f"quantity={statement.quantity!r} must be one of {', '.join(known)}")
    predicted = values
    if statement.kind != "order":
        predicted = {name: evaluate(statement.formula, {**measured[name], **sizes[name]}) for name in names}
    if statement.kind == "proportional":
        scale = values[names[0]] / predicted[names[0]]
        predicted = {name: value * scale for name, value in predicted.items()}
    holds = _holds(statement, list(predicted.values()), list(values.values()))
    points = [Point(name, predicted[name], values[name]) for name in names]
    return CheckedStatement(
        statement.text, statement.quantity, statement.kind, holds, points, statement.quantity in TIMED
    )


def _holds(statement: Statement, predicted: list[float], measured: list[float]) -> bool:
    if statement.kind == "order":
        least = 1 + statement.tolerance
        return all(after > before * least for before, after in pairwise(measured))
    share, slack = statement.tolerance + _EXACT, statement.slack + _EXACT
    pairs = list(zip(measured, predicted, strict=True))
    if statement.kind == "at_most":
        return all(value <= limit * (1 + share) + statement.slack for value, limit in pairs)
    return all(math.isclose(value, limit, rel_tol=share, abs_tol=slack) for value, limit in pairs)
