"""Run of an experiment on this machine: its cases on ranks, its statements, and the published figures beside them."""

import datetime
import time
from collections.abc import Callable

import torch

from fused_megatron.benchmarking.report.experiment_results import ExperimentResult, MeasuredRun
from fused_megatron.config import TrainConfig
from fused_megatron.experiments.catalogue import Case, Experiment
from fused_megatron.experiments.formulas import sizes_of_run
from fused_megatron.experiments.measured_link import RANKS as LINK_RANKS
from fused_megatron.experiments.measured_link import measure_on_link, why_no_link
from fused_megatron.experiments.measured_rank import Measured, largest_of, measure_rank
from fused_megatron.experiments.paper_scale import case_text, published_figures
from fused_megatron.experiments.trend_checks import judge
from fused_megatron.planning.rank_memory import rank_memory
from fused_megatron.testing import run_cases_on_ranks

LIMIT_S = 300.0
"""Seconds after which the ranks of an experiment are ended: an experiment takes less than a minute."""


def run_experiment(experiment: Experiment, say: Callable[[str], None] = lambda line: None) -> ExperimentResult:
    """Run the cases of an experiment on gloo ranks of this machine, and check its statements.

    Args:
        experiment: of the catalogue.
        say: called with a line before each group of runs.

    Raises:
        InputError: a config that does not fit.
        RankError: a rank failed.
    """
    start = time.perf_counter()
    entry = experiment.entry
    configs = {name: experiment.config(name) for name in entry.cases}
    first = configs[entry.cases[0]]
    left_out, why = _left_out(experiment)
    configs = {name: config for name, config in configs.items() if name not in left_out}
    measured = _measure(experiment, configs, say)
    sizes = {name: formula_names(config, experiment.cases[name]) for name, config in configs.items()}
    statements = [
        judge(statement, sizes, measured)
        for statement in entry.statements
        if not left_out.intersection(statement.cases or entry.cases)
    ]
    runs = [
        MeasuredRun(name, case_text(config, first, experiment.cases[name]), config.parallel.num_ranks, measured[name])
        for name, config in configs.items()
    ]
    return ExperimentResult(
        id=entry.id,
        title=entry.title,
        why=entry.why,
        date=datetime.date.today().isoformat(),
        seconds=time.perf_counter() - start,
        source=experiment.table.source,
        runs=runs,
        statements=statements,
        published=published_figures(experiment),
        notes=[*why, *entry.notes, *(run.note for run in experiment.paper_runs.values() if run.note)],
        settings={"model": model_text(first), "torch": torch.__version__.partition("+")[0]},
    )


def _left_out(experiment: Experiment) -> tuple[set[str], list[str]]:
    """Return the cases that this machine cannot run, and the line that says why."""
    linked = {name for name, case in experiment.cases.items() if case.link_mbit_per_s is not None}
    why = why_no_link() if linked else None
    if why is None:
        return set(), []
    statements = sum(bool(linked.intersection(each.cases or linked)) for each in experiment.entry.statements)
    plural = "s" * (statements > 1)
    return linked, [f"{', '.join(sorted(linked))} and {statements} statement{plural} left out here: {why}"]


def _measure(
    experiment: Experiment, configs: dict[str, TrainConfig], say: Callable[[str], None]
) -> dict[str, Measured]:
    """Measure the cases; the cases with the same number of ranks share their processes."""
    groups: dict[int, list[str]] = {}
    linked: dict[str, tuple[TrainConfig, float]] = {}
    for name, config in configs.items():
        rate = experiment.cases[name].link_mbit_per_s
        if rate is None:
            groups.setdefault(config.parallel.num_ranks, []).append(name)
        else:
            linked[name] = config, rate
    found: dict[str, Measured] = {}
    for world_size, names in groups.items():
        say(f"{experiment.entry.id}: {', '.join(names)} on {world_size} rank{'s' * (world_size > 1)}")
        own = {name: experiment.cases[name] for name in names}
        cases = [(configs[name], _sleep_ms(case), case.steps, case.lr) for name, case in own.items()]
        results = run_cases_on_ranks(measure_rank, world_size, cases, timeout_s=LIMIT_S)
        found |= {name: largest_of(ranks) for name, ranks in zip(names, results, strict=True)}
    if linked:
        say(f"{experiment.entry.id}: {', '.join(linked)} on {LINK_RANKS} ranks, joined by a cable")
        found |= {name: largest_of(ranks) for name, ranks in measure_on_link(linked, LIMIT_S).items()}
    return {name: found[name] for name in configs}


def formula_names(config: TrainConfig, case: Case) -> dict[str, float]:
    """Return the names of formulas: the sizes of a run, its steps, and the planner's figures of the fullest rank."""
    return sizes_of_run(config) | {"steps": case.steps or 1} | ({} if case.sleeps else planned_figures(config))


def planned_figures(config: TrainConfig) -> dict[str, float]:
    """Return the planner's peak and its bytes of weights, each of the rank that has most."""
    ranks = range(config.parallel.pipeline_parallel_size)
    weights = max(rank_memory(config, rank).weights for rank in ranks)
    return {"planned_bytes": rank_memory(config).total, "planned_weights": weights}


def _sleep_ms(case: Case) -> tuple[float, float] | None:
    if case.forward_ms is None or case.backward_ms is None:
        return None
    return case.forward_ms, case.backward_ms


def model_text(config: TrainConfig) -> str:
    """Return the size of a model in words."""
    model = config.model
    experts = f", {model.num_experts} experts" if model.num_experts else ""
    return (
        f"GPT of {model.num_layers} layers of {model.hidden_size}, {model.seq_len} tokens, "
        f"{model.vocab_size} in the vocabulary{experts}, {config.training.weight_dtype}"
    )
