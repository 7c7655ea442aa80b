"""Results file of an experiment: measurements, checked statements, predictions beside published figures.

{"format": "fused-megatron experiment", "version": 1, "id": 106, "title": "..", "runs": [..], ..}
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from fused_megatron.checks import InputError, check
from fused_megatron.untrusted_files import MOST_JSON_BYTES, convert, parse_json, read_bounded
from fused_megatron.untrusted_files import ShownText as Text

FORMAT, VERSION = "fused-megatron experiment", 1
LOSS = "loss_"
"""Names of figures that are losses begin so; the loss of step 7 has the name loss_007."""
_MOST = 1000
# Larger than any number of bytes or operations; JSON has no limit.
_Figure = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]


@dataclass(frozen=True)
class MeasuredRun:
    """A run on this machine.

    Attributes:
        case: its name.
        layout: its layout, for tables.
        ranks: number of ranks.
        figures: the largest of all ranks, by name.
    """

    case: Text
    layout: Text
    ranks: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    figures: dict[Text, _Figure]


@dataclass(frozen=True)
class Point:
    """Predicted and measured value of a run; predicted equals measured where a statement is only about the order."""

    case: Text
    predicted: _Figure
    measured: _Figure


@dataclass(frozen=True)
class CheckedStatement:
    """A trend, and whether the run confirms it.

    Attributes:
        text: the trend in words.
        quantity: the measured figure.
        kind: equals, proportional, at_most or order.
        holds: the verdict.
        points: the values.
        timed: whether the load of the machine changes the values.
    """

    text: Text
    quantity: Text
    kind: Text
    holds: bool
    points: Annotated[list[Point], msgspec.Meta(max_length=_MOST)]
    timed: bool = False


@dataclass(frozen=True)
class PublishedFigure:
    """A prediction for the machine of a publication beside the published figure.

    Attributes:
        run: name of the published run.
        layout: its layout and machine.
        figure: what it is, with its unit: "step, ms".
        predicted, low, high: the prediction and its error bar; None: nothing is predicted.
        published: None: not published.
    """

    run: Text
    layout: Text
    figure: Text
    predicted: _Figure | None
    low: _Figure | None
    high: _Figure | None
    published: _Figure | None

    @property
    def inside(self) -> bool | None:
        """Whether the published figure lies within the error bar; None if one of them is missing."""
        if self.low is None or self.high is None or self.published is None:
            return None
        return self.low <= self.published <= self.high


@dataclass(frozen=True)
class ExperimentResult:
    """Result of an experiment.

    Attributes:
        id, title, why: of the experiment.
        date: day of the run, "2026-11-22".
        seconds: time of the whole run.
        source: of the published figures.
        runs: the measurements.
        statements: the trends.
        published: the paper scale.
        notes: what the publication says otherwise, and why.
        settings: versions and the model of the runs.
    """

    id: Annotated[int, msgspec.Meta(ge=1, le=99999)]
    title: Text
    why: Text
    date: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")]
    seconds: Annotated[float, msgspec.Meta(ge=0, le=1e7)]
    source: Text
    runs: Annotated[list[MeasuredRun], msgspec.Meta(max_length=_MOST)]
    statements: Annotated[list[CheckedStatement], msgspec.Meta(max_length=_MOST)]
    published: Annotated[list[PublishedFigure], msgspec.Meta(max_length=_MOST)]
    notes: Annotated[list[Text], msgspec.Meta(max_length=_MOST)]
    settings: dict[Text, Text] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether every statement holds."""
        return all(statement.holds for statement in self.statements)


def write_experiment(result: ExperimentResult, path: Path) -> None:
    """Replace the file by this result; a reader sees the old file or the new one.

    Raises:
        OSError: the file cannot be written; the old one is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replacement = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    whole = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(result)}
    try:
        replacement.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        replacement.replace(path)
    finally:
        replacement.unlink(missing_ok=True)  # left by a full disk or Ctrl-C


def read_experiment(path: Path) -> ExperimentResult | None:
    """Read the result of an experiment; None if the file has something else.

    Raises:
        InputError: the file is damaged, or of another version.
    """
    try:
        whole: Any = parse_json(read_bounded(path, MOST_JSON_BYTES), object)
    except (OSError, InputError):  # the reader of other results says what is wrong
        return None
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        return None
    version = whole.get("version")
    check(version == VERSION, f"{path} has version={version!r:.20} of an experiment; this release reads {VERSION}")
    try:
        return convert(whole, ExperimentResult)
    except InputError as error:
        raise InputError(f"{path} is damaged: {error} (run the experiment again)") from None
