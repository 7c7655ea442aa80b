"""Comparison of what several ranks computed with what one process computed, tensor by tensor."""

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

# Allowed distance of a float32 result from one process, relative to a scale of the tensor (Reference.scale):
# sums of a few thousand products are made in another order, and a model of some blocks adds their roundings up. Right
# layouts of all forms reach a tenth of it (tests/planning/verify/test_config_check.py prints them), planted faults a
# hundred times and more.
FLOAT32 = 2e-5
# Of a weight, relative to the learning rate: an update is the gradient over the root of its square plus eps, so that
# an error of the gradient counts as much as it is beside eps.
UPDATE = 2e-3
# What a float32 weight may be off by its own rounding, in units of eps of the largest one.
WEIGHT_ULPS = 4.0
# Low precision: so many times the error that one process in this precision has beside float32. The sum over R ranks
# rounds R partial sums, which one process does not: 1.8 times the error for R = 4 (testing/sharded_tolerances.py).
LOW_PRECISION_FACTOR = 4.0
# A number (loss, norm) of one process may be right by luck, errors of both signs in it: at least a sixteenth of what a
# bfloat16 number may be off by, relative.
LEAST_NUMBER_ERROR = 2.0**-12
# A tensor's gradient may be only rounding beside the largest gradient of the model (the bias of keys has 0).
SMALLEST_GRADIENT = 1e-2


@dataclass(frozen=True)
class Difference:
    """The first tensor that is not what one process computes.

    Attributes:
        kind, step, tensor: which one, as records.Key.
        part: of a parameter that stacks several full ones.
        described: the same in words.
        error, allowed: relative to the scale of the tensor; error is nan where a number is.
        ranks: that differ, and what they hold of it, in words.
        ranks_right: that hold some of it and do not differ.
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
    """All tensors of a kind.

    Attributes:
        kind: as of records.
        num_tensors: compared.
        num_different: of them.
        error, allowed: of the tensor that comes nearest to what is allowed, or exceeds it most; relative.
        where: that tensor and the rank, in words.
    """

    kind: str
    num_tensors: int
    num_different: int
    error: float
    allowed: float
    where: str


@dataclass(frozen=True)
class Comparison:
    """What came of a comparison.

    Attributes:
        rows: one for each kind.
        first: the first tensor in the order of computation that differs; None where none does.
        first_hint: the first of the kinds that may differ (Reference.hints).
    """

    rows: tuple[Row, ...]
    first: Difference | None
    first_hint: Difference | None = None


class Reference:
    """What one process computed, and how far others may be from it.

    Args:
        record: of one process in float32.
        lr: learning rate of every update.
        yardstick: of one process in the precision of the layout; None for float32.
        hints: kinds of tensors that may differ where the result is right (partial sums of a user's module).
        tolerance: in place of FLOAT32.
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
        """What an error of this tensor is relative to, above 0."""
        largest = self._largest[key]
        if key.kind == WEIGHT:
            return self._lr
        if key.kind == GRADIENT:
            largest = max(largest, SMALLEST_GRADIENT * self._largest_gradient[key.step])
        return largest or 1.0

    def allowed(self, key: Key) -> float:
        """The largest error of this tensor, relative to its scale."""
        if key.kind == START:
            return 0.0
        if self._low_precision:
            return LOW_PRECISION_FACTOR * self._low_precision[key.kind]
        updates = key.step  # each brings the errors of those before it
        if key.kind == WEIGHT:
            rounding = WEIGHT_ULPS * float(np.finfo(np.float32).eps) * self._largest[key] / self._lr
            return updates * (UPDATE + rounding)
        return updates * self._tolerance


@dataclass
class _Found:
    """One tensor on all ranks: the worst rank, those that differ, those that do not."""

    error: float = 0.0
    worst: str = ""
    part: str = ""
    wrong: dict[int, str] | None = None
    right: tuple[int, ...] = ()


def compare(reference: Reference, ranks: Sequence[RankRecord]) -> Comparison:
    """Compare the records of all ranks with the record of one process."""
    rows: dict[str, Row] = {}
    first: dict[bool, Difference] = {}  # by whether it is a hint
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
    """A row with one more tensor."""
    count, different = (row.num_tensors, row.num_different) if row else (0, 0)
    error, most, where = (row.error, row.allowed, row.where) if row else (0.0, allowed, "")
    if row is None or not _share(found.error, allowed) <= _share(error, most):
        where = f"{_described(key, found.part)}, {found.worst}" if found.error != 0.0 else ""
        error, most = found.error, allowed
    return Row(key.kind, count + 1, different + differs, error, most, where)


def _share(error: float, allowed: float) -> float:
    """Of what is allowed; nan exceeds all."""
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
    """Which elements of the full tensor, in words."""
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
"""What a table calls the kinds."""
