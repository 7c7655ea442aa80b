"""Comparison of the tensors of several ranks with the tensors of one process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fused_megatron.planning.verify.records import (
    GRADIENT,
    LOSS,
    NORM,
    OUTPUT,
    START,
    WEIGHT,
    Key,
    RankRecord,
    full_arrays,
)

# Largest allowed float32 error, relative to the scale of the tensor (Reference.scale). A layout sums a few thousand
# products in another order than one process, and the rounding errors of the blocks add up. Right layouts reach a tenth
# of this (tests/planning/verify/test_config_check.py prints them); planted faults exceed it a hundred times and more.
FLOAT32 = 2e-5
# Largest allowed error of a weight in one update, relative to the learning rate. AdamW divides a gradient by the root
# of its square plus eps, so an error of the gradient counts relative to eps.
UPDATE = 2e-3
# Largest error of a float32 weight by its own rounding, in units of eps times the largest weight.
WEIGHT_ULPS = 4.0
# Low precision: largest allowed error, in units of the error of one process in this precision beside float32. The sum
# over R ranks also rounds R partial sums: 1.8 times the error for R = 4 (testing/sharded_tolerances.py).
LOW_PRECISION_FACTOR = 4.0
# Least relative error that is assumed for a number (loss, norm) of one process in low precision, whose errors may
# cancel by luck: a sixteenth of the largest rounding error of a bfloat16 number.
LEAST_NUMBER_ERROR = 2.0**-12
# Least scale of a gradient, relative to the largest gradient of the model: some gradients are nothing but rounding
# errors (the gradient of the bias of keys is 0).
SMALLEST_GRADIENT = 1e-2


@dataclass(frozen=True)
class Difference:
    """The first tensor that differs from one process.

    Attributes:
        kind, step, tensor: kind, step and name of the tensor, as in records.Key.
        part: name of the part, if the parameter stacks several full ones.
        described: kind, step, tensor and part as text.
        error, allowed: error and largest allowed error, relative to the scale of the tensor; error is nan if a number
            of the tensor is nan.
        ranks: for each rank that differs, the rank and its elements of the tensor as text.
        ranks_right: ranks that hold elements of the tensor and do not differ.
    """

    kind: str
    step: int
    tensor: str
    part: str
    described: str
    error: float
    allowed: float
    ranks: dict[int, str]
    ranks_right: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """Comparison of all tensors of a kind.

    Attributes:
        kind: kind of the tensors, as in records.
        num_tensors: number of compared tensors.
        num_different: number of tensors that differ.
        error, allowed: relative error and largest allowed error of the tensor for which error / allowed is largest.
        where: this tensor and its rank as text.
    """

    kind: str
    num_tensors: int
    num_different: int
    error: float
    allowed: float
    where: str


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison.

    Attributes:
        rows: a row for each kind of tensor.
        first: the first tensor in the order of computation that differs; None if no tensor differs.
        first_hint: the first tensor that differs, of the kinds that may differ (Reference.hints).
    """

    rows: tuple[Row, ...]
    first: Difference | None
    first_hint: Difference | None = None


class Reference:
    """Tensors of one process, and the largest allowed error of each.

    Args:
        record: record of one process in float32.
        lr: learning rate of every update.
        yardstick: record of one process in the precision of the layout; None for float32.
        hints: kinds of tensors that may differ although the result is right (partial sums of a user's module).
        tolerance: replaces FLOAT32.
    """

    def __init__(
        self,
        record: RankRecord,
        lr: float,
        yardstick: RankRecord | None = None,
        hints: Sequence[str] = (),
        tolerance: float = FLOAT32,
    ) -> None:
        self.arrays = full_arrays(record)
        self.parts = {key: {piece.part: piece.place for piece in pieces} for key, pieces in record.pieces.items()}
        self.hints = tuple(hints)
        self._lr, self._tolerance = lr, tolerance
        self._largest = {key: float(np.abs(array).max(initial=0.0)) for key, array in self.arrays.items()}
        self._largest_gradient: dict[int, float] = {}
        for key, largest in self._largest.items():
            if key.kind == GRADIENT:
                self._largest_gradient[key.step] = max(largest, self._largest_gradient.get(key.step, 0.0))
        self._low_precision: dict[str, float] = {}
        if yardstick is not None:
            self._low_precision = {LOSS: LEAST_NUMBER_ERROR, NORM: LEAST_NUMBER_ERROR}
            for key, array in full_arrays(yardstick).items():
                error = float(np.abs(array - self.arrays[key]).max(initial=0.0)) / self.scale(key)
                self._low_precision[key.kind] = max(error, self._low_precision.get(key.kind, 0.0))

    def scale(self, key: Key) -> float:
        """Return the scale of this tensor, by which its errors are divided; above 0."""
        largest = self._largest[key]
        if key.kind == WEIGHT:
            return self._lr
        if key.kind == GRADIENT:
            largest = max(largest, SMALLEST_GRADIENT * self._largest_gradient[key.step])
        return largest or 1.0

    def allowed(self, key: Key) -> float:
        """Return the largest allowed error of this tensor, relative to its scale."""
        if key.kind == START:
            return 0.0
        if self._low_precision:
            return LOW_PRECISION_FACTOR * self._low_precision[key.kind]
        updates = key.step  # every update adds its errors to the errors of the updates before it
        if key.kind == WEIGHT:
            rounding = WEIGHT_ULPS * float(np.finfo(np.float32).eps) * self._largest[key] / self._lr
            return updates * (UPDATE + rounding)
        return updates * self._tolerance


@dataclass
class _Found:
    """Comparison of one tensor on all ranks: the worst rank, the ranks that differ, the ranks that do not."""

    error: float = 0.0
    worst: str = ""
    part: str = ""
    wrong: dict[int, str] | None = None
    right: tuple[int, ...] = ()


def compare(reference: Reference, ranks: Sequence[RankRecord]) -> Comparison:
    """Compare the records of all ranks with the record of one process."""
    rows: dict[str, Row] = {}
    first: dict[bool, Difference] = {}  # the key is whether the difference is only a hint
    for key, full in reference.arrays.items():
        found, allowed = _compare_tensor(reference, key, full, ranks), reference.allowed(key)
        differs = bool(found.wrong)
        if differs:
            difference = Difference(
                key.kind,
                key.step,
                key.name,
                found.part,
                _described(key, found.part),
                found.error,
                allowed,
                found.wrong or {},
                found.right,
            )
            first.setdefault(key.kind in reference.hints, difference)
        rows[key.kind] = _with(rows.get(key.kind), key, found, allowed, differs)
    return Comparison(tuple(rows.values()), first.get(False), first.get(True))


def _described(key: Key, part: str) -> str:
    return key._replace(name=f"{key.name}.{part}" if part else key.name).describe()


def _with(row: Row | None, key: Key, found: _Found, allowed: float, differs: bool) -> Row:
    """Return a row with one more tensor."""
    count, different = (row.num_tensors, row.num_different) if row else (0, 0)
    error, most, where = (row.error, row.allowed, row.where) if row else (0.0, allowed, "")
    if row is None or not _share(found.error, allowed) <= _share(error, most):
        where = f"{_described(key, found.part)}, {found.worst}" if found.error != 0.0 else ""
        error, most = found.error, allowed
    return Row(key.kind, count + 1, different + differs, error, most, where)


def _share(error: float, allowed: float) -> float:
    """Return error / allowed; inf if error is nan."""
    if np.isnan(error):
        return float("inf")
    return error / allowed if allowed else float("inf") if error else 0.0


def _compare_tensor(reference: Reference, key: Key, full: np.ndarray, ranks: Sequence[RankRecord]) -> _Found:
    found, scale, allowed = _Found(wrong={}), reference.scale(key), reference.allowed(key)
    covered = np.zeros(full.shape, dtype=bool)
    right: list[int] = []
    for rank, record in enumerate(ranks):
        pieces = record.pieces.get(key, [])
        errors = []
        for piece in pieces:
            piece.of(covered)[...] = True
            wanted = piece.of(full)
            fits = wanted.shape == piece.values.shape
            error = float(np.abs(piece.values - wanted).max(initial=0.0)) / scale if fits else float("nan")
            errors.append((_share(error, allowed), error, piece))
        if not errors:
            continue
        share, error, piece = max(errors, key=lambda each: each[0])
        where = f"on rank {rank}{_coordinates(record.coordinates)}"
        if not found.worst or not _share(found.error, allowed) >= share:
            found.error, found.worst, found.part = error, where, piece.part
        if share > 1:
            assert found.wrong is not None
            found.wrong[rank] = f"{where}, {_place(piece.place, full.shape)}"
        else:
            right.append(rank)
    if not covered.all() and not found.wrong:
        found.error, found.worst = float("nan"), "on no rank"
        found.wrong = {-1: f"{int((~covered).sum())} of {full.size} elements are on no rank"}
    found.right = tuple(right)
    return found


def _coordinates(axes: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{axis} {index}' for axis, index in axes.items())})" if axes else ""


def _place(place: Sequence[tuple[int, int]], shape: Sequence[int]) -> str:
    """Return text that names these elements of the full tensor."""
    if not place or all(start == 0 and stop == size for (start, stop), size in zip(place, shape, strict=True)):
        return "all of it"
    shown = ", ".join(f"{start}:{stop}" for start, stop in place)
    return f"elements [{shown}] of {list(shape)}"


NAMES = {
    START: "weights at the start",
    OUTPUT: "outputs of modules",
    LOSS: "loss",
    GRADIENT: "gradients",
    NORM: "gradient norm",
    WEIGHT: "weights after updates",
}
"""Names of the kinds of tensors in a table."""
