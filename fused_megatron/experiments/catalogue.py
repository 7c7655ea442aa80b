"""The experiments of the package, read from the TOML files in `tables`: a small run, a published run, a trend."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from fused_megatron.checks import InputError, check
from fused_megatron.config import TrainConfig
from fused_megatron.config.config_file import config_from
from fused_megatron.untrusted_files import convert, parse_toml

FOLDER = Path(__file__).parent / "tables"
"""Folder of the files, one for each table of experiments."""
_NUM_NEAR = 3
Values = dict[str, Any]


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a run changes in the config of its table.

    Attributes:
        model, parallel, training: keys of the sections of a config.
        microbatches: microbatches of a rank in a step; the global batch follows from it.
        planned_ranks: the planner chooses the layout for this number of ranks and the same global batch.
        planned_memory_gb: memory of a rank for the planner, of tensors only; None: the GPUs of the scale's machine.
    """

    model: Values = {}
    parallel: Values = {}
    training: Values = {}
    microbatches: int = 1
    planned_ranks: int | None = None
    planned_memory_gb: float | None = None


class Case(Layout, frozen=True, forbid_unknown_fields=True):
    """A run on this machine.

    Attributes:
        forward_ms, backward_ms: with both, the stages sleep for these times instead of computing, and the time of the
            schedule is measured. They are of a rank's share of a microbatch.
        link_mbit_per_s: two ranks are joined by a cable of this rate, in 10^6 bits per second, which needs root on
            Linux. Where there is none, the case is left out, and so are the statements about it.
        steps: with sleeping stages, steps that overlap. Without, the run trains for these steps, and its loss curve and
            the versions of its weights are measured. None: one step is measured.
        lr: learning rate of a run that trains.
    """

    forward_ms: float | None = None
    backward_ms: float | None = None
    link_mbit_per_s: float | None = None
    steps: int | None = None
    lr: float = 0.003

    @property
    def sleeps(self) -> bool:
        """Whether the stages sleep instead of computing."""
        return self.forward_ms is not None and self.backward_ms is not None


class PaperRun(Layout, frozen=True, forbid_unknown_fields=True):
    """A run on the machine of a publication.

    Attributes:
        published: figures of the publication, by the names of FIGURES in paper_scale.py.
        machine, engine: where they differ from the table's.
        tokens: of the whole training, for the days.
        source: where the figures stand, if it is not the table's source.
        note: what a reader must know about the figures.
    """

    published: dict[str, float] = {}
    machine: str | None = None
    engine: str | None = None
    tokens: float | None = None
    source: str = ""
    note: str = ""


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A trend that a run confirms or refutes.

    Attributes:
        text: the trend in words.
        quantity: what is measured, a name of measured_rank.py.
        kind: equals: the measured value is the formula's. proportional: the ratios between the runs are the formula's.
            at_most: the measured value is no larger. order: the runs in `cases` have growing values.
        formula: arithmetic over the names of formulas.py.
        tolerance: largest relative difference.
        slack: largest difference beside it, in the unit of the quantity.
        cases: the runs that count; empty: all of the experiment.
        why: the reason for the formula and for a tolerance.
    """

    text: str
    quantity: str
    kind: Literal["equals", "proportional", "at_most", "order"] = "equals"
    formula: str = ""
    tolerance: float = 0.0
    slack: float = 0.0
    cases: tuple[str, ...] = ()
    why: str = ""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An experiment as its file has it; the names are of the cases and paper_runs of the same file."""

    id: int
    title: str
    why: str
    cases: tuple[str, ...]
    statements: tuple[Statement, ...]
    paper: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Scale(Layout, frozen=True, forbid_unknown_fields=True):
    """The config that the runs of a table share.

    Attributes:
        machine: name of a shipped cluster, of the published runs and of the planner.
        engine: the program that ran the published steps.
        gb_bytes: bytes of the published GB.
        dropout: of the published runs. Its masks take memory; the predicted time leaves it out.
    """

    machine: str = ""
    engine: str = ""
    gb_bytes: float = 1e9
    dropout: float = 0.0


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of experiments."""

    title: str
    about: str
    source: str
    laptop: Scale
    cases: dict[str, Case]
    experiments: tuple[Entry, ...]
    paper: Scale = Scale()
    paper_runs: dict[str, PaperRun] = {}


@dataclass(frozen=True)
class Experiment:
    """An experiment with the table that it belongs to."""

    entry: Entry
    table: Table

    @property
    def cases(self) -> dict[str, Case]:
        """The runs on this machine, by name."""
        return {name: self.table.cases[name] for name in self.entry.cases}

    @property
    def paper_runs(self) -> dict[str, PaperRun]:
        """The published runs, by name."""
        return {name: self.table.paper_runs[name] for name in self.entry.paper}

    def config(self, name: str) -> TrainConfig:
        """Return the config of a run on this machine."""
        return layout_config(self.table.laptop, self.table.cases[name], f"experiment {self.entry.id}, case {name}")

    def paper_config(self, name: str) -> TrainConfig:
        """Return the config of a published run."""
        run = self.table.paper_runs[name]
        return layout_config(self.table.paper, run, f"experiment {self.entry.id}, published run {name}")


def layout_config(scale: Scale, layout: Layout, source: str) -> TrainConfig:
    """Return the config of a run: the table's config with the run's changes.

    Args:
        scale: config that the runs share.
        layout: the run's changes.
        source: for messages.

    Raises:
        InputError: a key or a value that does not fit.
    """
    parallel = {"data_parallel_size": 1, **scale.parallel, **layout.parallel}
    training = {"microbatch_size": 1, **scale.training, **layout.training}
    replicas = parallel["data_parallel_size"]
    training["global_batch_size"] = replicas * training["microbatch_size"] * layout.microbatches
    table = {"model": {**scale.model, **layout.model}, "parallel": parallel, "training": training}
    config = config_from(table, (), source)
    if layout.planned_ranks is None:
        return config
    # The planner is not needed for a list of the experiments.
    from fused_megatron.experiments.planned_layout import planned_config  # noqa: PLC0415

    return planned_config(config, layout.planned_ranks, scale.machine, layout.planned_memory_gb)


def with_dropout(config: TrainConfig, dropout: float) -> TrainConfig:
    """Return the config with this dropout everywhere."""
    model = dataclasses.replace(
        config.model, hidden_dropout=dropout, attention_dropout=dropout, embedding_dropout=dropout
    )
    return dataclasses.replace(config, model=model)


@cache
def all_experiments() -> dict[int, Experiment]:
    """Return every experiment of the package by its id, in the order of the ids.

    Raises:
        InputError: a file does not fit; it names the file.
    """
    found: dict[int, Experiment] = {}
    for path in sorted(FOLDER.glob("*.toml")):
        for each in read_table(path):
            check(each.entry.id not in found, f"{path.name}: id={each.entry.id} must be of one experiment only")
            found[each.entry.id] = each
    return dict(sorted(found.items()))


def read_table(path: Path) -> list[Experiment]:
    """Read the experiments of a file.

    Raises:
        InputError: no TOML, an unknown key, or a name without its case.
    """
    try:
        table = convert(parse_toml(path.read_bytes()), Table)
    except InputError as error:
        raise InputError(f"{path.name}: {error}") from None
    for entry in table.experiments:
        wanted = {name for statement in entry.statements for name in statement.cases}
        for given, known, kind in (
            (entry.cases, table.cases, "cases"),
            (entry.paper, table.paper_runs, "paper_runs"),
            (wanted, entry.cases, f"the cases of experiment {entry.id}"),
        ):
            unknown = sorted(set(given) - set(known))
            check(not unknown, f"{path.name}: experiment {entry.id}: {unknown[:1]} must be one of {kind}")
    return [Experiment(entry, table) for entry in table.experiments]


def find_experiments(words: Sequence[str]) -> list[Experiment]:
    """Return the experiments with these ids.

    Raises:
        InputError: a word that is no id; the message names the nearest ones.
    """
    known: Mapping[int, Experiment] = all_experiments()
    found = []
    for word in words:
        number = int(word) if word.isascii() and word.isdigit() and len(word) < 10 else None
        if number not in known:
            near = sorted(known, key=lambda each: (abs(each - (number or 0)), each))[:_NUM_NEAR]
            text = f"nearest: {', '.join(map(str, sorted(near)))}; " if number is not None else ""
            raise InputError(
                f"id={word!r:.40} must be the number of an experiment ({text}all: fused-megatron experiment list)"
            )
        assert number is not None
        found.append(known[number])
    return found
