"""Fit of a cluster's constants to measurements: each observation has a prediction, and the fit moves all constants."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fused_megatron.planning.prediction.cluster import Cluster

_DIFFERENCE = 0.02
"""Step of a logarithm for a derivative."""
_LARGEST_MOVE = 0.7
"""Largest move of a logarithm in one iteration."""
_ITERATIONS, _TRIES = 15, 5
_HUBER = 0.1
"""Error above which its loss grows linearly: a disturbed measurement moves no constant far."""
_SHARES = ("product_efficiency", "attention_efficiency", "transfer_overlap")


@dataclass(frozen=True)
class Observation:
    """A measured time, and the prediction of it.

    Attributes:
        kind: group in the report: "products", "steps".
        label: for the report.
        seconds: measured.
        predicted: returns the predicted seconds on a cluster.
        weight: of its error in the fit.
    """

    kind: str
    label: str
    seconds: float
    predicted: Callable[[Cluster], float]
    weight: float = 1.0

    def error(self, cluster: Cluster) -> float:
        """Return predicted / measured - 1."""
        return self.predicted(cluster) / self.seconds - 1


def fit(cluster: Cluster, observations: Sequence[Observation], names: Sequence[str], prior: float = 0.01) -> Cluster:
    """Return the cluster whose named constants describe the observations best.

    Least squares of the logarithms of predicted over measured, by damped Gauss-Newton steps in the logarithms of the
    constants (Levenberg-Marquardt): a relative error costs the same for short and for long times, and no constant
    becomes negative.

    Args:
        cluster: the start.
        observations: at least one.
        names: of the constants to fit; all are above 0 in `cluster`.
        prior: weight of a constant's distance from its start. It keeps constants that no observation shows.
    """
    start = torch.tensor([math.log(getattr(cluster, name)) for name in names], dtype=torch.float64)
    weights = torch.tensor([observation.weight for observation in observations], dtype=torch.float64)

    def residuals_at(point: torch.Tensor) -> torch.Tensor:
        here = _moved(cluster, names, point)
        return torch.tensor([math.log(o.predicted(here) / o.seconds) for o in observations], dtype=torch.float64)

    def loss_of(residuals: torch.Tensor, point: torch.Tensor) -> float:
        size = residuals.abs()
        each = torch.where(size < _HUBER, size.square(), 2 * _HUBER * size - _HUBER**2)
        return float((weights * each).sum() + prior * (point - start).square().sum())

    point, residuals = start, residuals_at(start)
    loss, damping = loss_of(residuals, start), 1e-3
    for _ in range(_ITERATIONS):
        shifted = point + _DIFFERENCE * torch.eye(len(names), dtype=torch.float64)
        slopes = torch.stack([(residuals_at(row) - residuals) / _DIFFERENCE for row in shifted], dim=1)
        robust = weights * (_HUBER / residuals.abs().clamp(min=_HUBER))
        gradient = slopes.T @ (robust * residuals) + prior * (point - start)
        normal = slopes.T @ (robust[:, None] * slopes) + prior * torch.eye(len(names), dtype=torch.float64)
        before = loss
        for _ in range(_TRIES):
            damped = normal + damping * torch.diag(normal.diagonal())
            trial = point - torch.linalg.solve(damped, gradient).clamp(-_LARGEST_MOVE, _LARGEST_MOVE)
            found = residuals_at(trial)
            if (new_loss := loss_of(found, trial)) < loss:
                point, residuals, loss, damping = trial, found, new_loss, damping / 3
                break
            damping *= 10
        if before - loss < 1e-6 * (1 + loss):
            break
    return _moved(cluster, names, point)


def _moved(cluster: Cluster, names: Sequence[str], logarithms: torch.Tensor) -> Cluster:
    values: dict[str, Any] = {name: math.exp(value) for name, value in zip(names, logarithms.tolist(), strict=True)}
    for name in _SHARES:
        if name in values:
            values[name] = min(values[name], 1.0)
    return dataclasses.replace(cluster, **values)


def error_table(cluster: Cluster, observations: Sequence[Observation]) -> list[tuple[str, int, float, float]]:
    """Return (kind, number, median and largest size of the error) for each kind of observation."""
    rows = []
    for kind in dict.fromkeys(observation.kind for observation in observations):
        errors = [abs(o.error(cluster)) for o in observations if o.kind == kind]
        rows.append((kind, len(errors), statistics.median(errors), max(errors)))
    return rows
