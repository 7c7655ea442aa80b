"""Result of a verification: for each layout the compared tensors, the first difference, and the axis at fault."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fused_megatron.planning.verify.comparison import NAMES, Difference, Row
from fused_megatron.planning.verify.likely_axis import Cause
from fused_megatron.planning.verify.records import WEIGHT

_MOST_RANKS_SHOWN = 8


@dataclass(frozen=True)
class LayoutResult:
    """Comparison of one layout with one process.

    Attributes:
        layout: the layout as text.
        num_ranks: number of its ranks.
        rows: a row for each kind of tensor; () if a rank raised.
        first: the first tensor that differs; None if no tensor differs.
        error: the error of a rank in one line; None if no rank raised.
        cause: the parts of the layout at fault; None if nothing is wrong.
        hint: the first submodule of a user's module whose output differs from one process.
        seconds: time of the comparison, with the search for the cause.
    """

    layout: str
    num_ranks: int
    rows: tuple[Row, ...]
    first: Difference | None
    error: str | None
    cause: Cause | None
    hint: str | None
    seconds: float

    @property
    def ok(self) -> bool:
        """Return whether the layout computes what one process computes."""
        return self.first is None and self.error is None


@dataclass(frozen=True)
class Verification:
    """Results of all verified layouts. It is true if every layout computes what one process computes.

    Attributes:
        subject: name of the config or module.
        setting: text on the reduction, the precision and the updates.
        layouts: results in the order in which the layouts ran.
    """

    subject: str
    setting: str
    layouts: tuple[LayoutResult, ...]

    @property
    def ok(self) -> bool:
        """Return whether no layout differs and no rank raised."""
        return all(layout.ok for layout in self.layouts)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def first_difference(self) -> Difference | None:
        """Return the first difference of the first layout that has one."""
        return next((layout.first for layout in self.layouts if layout.first is not None), None)

    def table(self) -> str:
        """Return the table that `fused-megatron verify` prints."""
        lines = [f"{self.subject}, {self.setting}"]
        for layout in self.layouts:
            lines += ["", *_layout_lines(layout)]
        return "\n".join(lines)

    def as_json(self) -> str:
        """Return all results as one JSON document."""
        document = {"ok": self.ok, **asdict(self)}
        for found, layout in zip(document["layouts"], self.layouts, strict=True):
            found["ok"] = layout.ok
            found["likely_axis"] = None if layout.cause is None else layout.cause.describe()
        return json.dumps(_plain(document), indent=2)


def _plain(value: Any) -> Any:
    """Return a value for JSON: a number that is not finite becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _layout_lines(layout: LayoutResult) -> list[str]:
    ranks = f"{layout.num_ranks} rank{'s' if layout.num_ranks > 1 else ''}"
    lines = [f"{layout.layout}: {ranks} beside one process, {layout.seconds:.0f} s"]
    if layout.rows:
        lines += _row_lines(layout.rows)
    if layout.error is not None:
        lines.append(f"FAILED: {layout.error}")
    if layout.first is not None:
        lines += _difference_lines(layout.first)
    if layout.hint is not None:
        lines.append(f"  first output that differs: {layout.hint}")
    if layout.cause is not None:
        lines.append(f"  likely axis: {layout.cause.describe()}")
    return [*lines, "SAME"] if layout.ok else lines


def _row_lines(rows: Sequence[Row]) -> list[str]:
    head = f"  {'compared':22} {'tensors':>7} {'differ':>6} {'largest':>8} {'allowed':>8}   where"
    return [head] + [
        f"  {NAMES[row.kind]:22} {row.num_tensors:7} {row.num_different:6} {row.error:8.1e} {row.allowed:8.1e}   "
        f"{row.where}"
        for row in rows
    ]


def _difference_lines(first: Difference) -> list[str]:
    relative_to = "the learning rate" if first.kind == WEIGHT else "its largest value"
    lines = [
        f"DIFFERENT, first in order of computation: {first.described}",
        f"  off by {first.error:.2g} of {relative_to}, {first.allowed:.1e} is allowed",
    ]
    shown = list(first.ranks.values())[:_MOST_RANKS_SHOWN]
    lines += [f"  {where}" for where in shown]
    if len(first.ranks) > len(shown):
        lines.append(f"  and on {len(first.ranks) - len(shown)} more")
    if first.ranks_right:
        lines.append(f"  right on rank {', '.join(map(str, first.ranks_right))}")
    return lines
