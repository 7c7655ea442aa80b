"""The command `fused-megatron experiment`: lists, shows and runs the experiments of the package."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fused_megatron.checks import InputError, check
from fused_megatron.experiments.catalogue import Experiment, all_experiments, find_experiments
from fused_megatron.experiments.completion import SHELLS, completion_script
from fused_megatron.optional_packages import install_command
from fused_megatron.terminal_tables import print_report

if TYPE_CHECKING:
    from fused_megatron.benchmarking.report.experiment_results import ExperimentResult


@dataclass(frozen=True)
class ExperimentArguments:
    """The experiments of the tutorial and the papers: a small run on this machine beside the published figures."""

    action: Annotated[Literal["list", "show", "run", "all", "completion"], tyro.conf.Positional]
    """list: all experiments. show: what one does. run: measure it, in less than a minute. all: run every one.
    completion: a script for bash, zsh or fish (source <(fused-megatron experiment completion bash))."""
    ids: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Ids, such as 106; for list and all: only these. For completion: the shell."""
    output: Path = Path("runs/experiments")
    """Folder of the results: ID.json, which `fused-megatron report` reads, and the picture ID.svg."""


def run_experiment_command(arguments: ExperimentArguments) -> int:
    """Run the action; return 1 if a statement does not hold, else 0.

    Raises:
        InputError: an unknown id or shell; or the folder cannot be written.
        KeyboardInterrupt: after the table of the results so far.
    """
    if arguments.action == "completion":
        shell = " ".join(arguments.ids)
        check(shell in SHELLS, f"shell={shell!r:.40} must be one of {', '.join(SHELLS)}")
        print(completion_script(shell), end="")
        return 0
    found = find_experiments(arguments.ids)
    if arguments.action in ("list", "all"):
        found = found or list(all_experiments().values())
    check(bool(found), f"{arguments.action} needs an id, such as 106 (all ids: fused-megatron experiment list)")
    if arguments.action == "list":
        print_report("\n".join(_list(found)))
        return 0
    if arguments.action == "show":
        for each in found:
            print_report("\n".join(_show(each)))
        return 0
    return _run(found, arguments.output, brief=arguments.action == "all")


def _list(found: Sequence[Experiment]) -> list[str]:
    lines = []
    for number, each in enumerate(found):
        if number == 0 or each.table is not found[number - 1].table:
            lines += ["", each.table.title, "", "| id | experiment | runs here | published |", "|---|---|---|---|"]
        entry = each.entry
        lines.append(f"| {entry.id} | {entry.title} | {', '.join(entry.cases)} | {', '.join(entry.paper)} |")
    return lines[1:]


def _show(each: Experiment) -> list[str]:
    # Both import the planner, which a list does not need.
    from fused_megatron.benchmarking.report.experiment_page import published_lines  # noqa: PLC0415
    from fused_megatron.experiments.paper_scale import case_text, published_figures  # noqa: PLC0415

    entry = each.entry
    lines = [
        f"{entry.id}  {entry.title}",
        "",
        entry.why,
        "",
        each.table.about,
        "",
        "| run here | layout |",
        "|---|---|",
    ]
    first = each.config(entry.cases[0])
    for name, case in each.cases.items():
        lines.append(f"| {name} | {case_text(each.config(name), first, case)} |")
    for statement in entry.statements:
        formula = f": {statement.quantity} = {statement.formula}" if statement.formula else f": {statement.quantity}"
        lines += ["", f"To hold: {statement.text}{formula} ({statement.kind}). {statement.why}".rstrip()]
    if entry.paper:
        lines += ["", f"Published: {each.table.source}", "", *published_lines(published_figures(each))]
    notes = [*entry.notes, *(run.note for run in each.paper_runs.values() if run.note)]
    return [*lines, "", *(f"Note: {note}" for note in notes)]


def _run(found: Sequence[Experiment], folder: Path, *, brief: bool) -> int:
    # These import torch, which a list does not need.
    from fused_megatron.benchmarking.report.experiment_page import experiment_lines, overview_lines  # noqa: PLC0415
    from fused_megatron.experiments.run_experiment import run_experiment  # noqa: PLC0415

    _check_folder(folder)
    results: list[ExperimentResult] = []
    try:
        for each in found:
            result = run_experiment(each, lambda line: print(line, flush=True))
            saved = _save(result, folder)
            results.append(result)
            print_report("\n".join([_line(result)] if brief else ["", *experiment_lines(result), "", saved]))
    finally:
        if len(found) > 1 and results:
            print_report("\n".join(["", *overview_lines(results), f"results: {folder}"]))
    return int(not all(result.holds for result in results))


def _check_folder(folder: Path) -> None:
    """Raise InputError, before anything is measured, if no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"output={folder} cannot be written: {error.strerror or error}") from None


def _line(result: ExperimentResult) -> str:
    return f"{result.id}  {result.title}: {'holds' if result.holds else 'does not hold'} ({result.seconds:.0f} s)"


def _save(result: ExperimentResult, folder: Path) -> str:
    """Write the result and its picture; return the line that names them."""
    from fused_megatron.benchmarking.report.experiment_results import write_experiment  # noqa: PLC0415 - as above
    from fused_megatron.experiments.picture import draw_experiment  # noqa: PLC0415 - as above

    path, picture = folder / f"{result.id}.json", folder / f"{result.id}.svg"
    try:
        write_experiment(result, path)
        drawn = draw_experiment(result, picture)
    except OSError as error:
        raise InputError(f"output={folder} cannot be written: {error.strerror or error}") from None
    return f"written: {path}, " + (str(picture) if drawn else f"no picture: {install_command('matplotlib')}")
