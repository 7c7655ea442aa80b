"""Predicted steps beside measured steps: layouts of one GPT on gloo ranks of this machine, also over a slow link.

    make bench-predicted                                      # calibrate, then 20 layouts of 2 and of 4 ranks
    make bench-predicted ARGS="--ranks 2 --rounds 9"
    make bench-predicted ARGS="--ranks 2 --rates 200 1000"    # 2 ranks joined by a link of this many Mbit/s (root)
    make bench-predicted ARGS="--cluster cluster.toml"        # with the constants of an earlier run

Every case first calibrates a cluster of its own (`fused-megatron calibrate`), on as many ranks over the same link. Then
it runs real steps of each layout with the trainer's own parts. The time in which another process held a core is left
out of both. Neighbours on the same host slow the cores of a virtual machine by up to a fifth, for seconds or minutes: a
fixed product is timed beside each step, and each step is stated at the speed of the calibration. The last lines say how
fast the cores were.

The bars: with 2 ranks a median error of at most 10 %, the worst at most 20 %, and the fastest layout chosen, or one
within 3 % of it; with 4 ranks, which share 2 cores, a rank correlation of at least 0.9.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pickle
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from gpt_layouts import SIZES
from predicted_layouts import Job, cases_of, config_of
from slow_link import join, run_on_link

from fused_megatron.benchmarking.report.measured_tables import MeasuredTables
from fused_megatron.planning.prediction.calibrate import Found, Plan, Run, calibrate, measure
from fused_megatron.planning.prediction.calibrate_command import fit_lines
from fused_megatron.planning.prediction.calibration_steps import calibration_configs
from fused_megatron.planning.prediction.cluster import Cluster, cluster_text, load_cluster
from fused_megatron.planning.prediction.machine_measurements import CPU_SIZES, usable_cores
from fused_megatron.planning.prediction.measured_steps import StepTimes, median_probe_s, steps_on_rank
from fused_megatron.planning.prediction.step_time import predict_step
from fused_megatron.testing import run_on_ranks
from fused_megatron.testing.two_hosts import TwoHosts, missing

HOSTS = TwoHosts("fm-predicted")
_AT_ONCE = 5
"""Steps of a layout in a row, after one that warms up."""
DOCS = Path(__file__).resolve().parents[1] / "docs"
HEAD = "| ranks | layouts | steps | median error | worst error | rank correlation | chosen layout over the fastest |"
MEDIAN, WORST, REGRET, CORRELATION = 0.10, 0.20, 0.03, 0.9


def run_job(job: Job, run: Run, *, prints: bool = True) -> tuple[Found | None, dict[str, StepTimes]]:
    """Return the measurements of the calibration, and the times of each layout; each has new ranks.

    Layouts alternate, so that a busy moment of the machine slows all of them.
    """
    found = None if job.plan is None else measure(job.plan, run)
    times = {case.name: StepTimes((), ()) for case in job.cases}
    for _ in range(-(-job.rounds // _AT_ONCE)):
        for case in job.cases:
            times[case.name] += run(steps_on_rank, "cpu", config_of(job.size, case), _AT_ONCE)
            if prints:
                print(f"  {case.name}: {1e3 * times[case.name].median_s(without_waits=True):.0f} ms", flush=True)
    return found, times


class Row(NamedTuple):
    """Measured and predicted seconds of a layout."""

    name: str
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1


def rows_of(job: Job, cluster: Cluster, times: dict[str, StepTimes], probe_s: float | None) -> list[Row]:
    """Predict each layout beside its median, at the speed of cores of the calibration."""
    return [
        Row(
            case.name,
            times[case.name].median_s(without_waits=True, probe_s=probe_s),
            predict_step(config_of(job.size, case), cluster).seconds,
        )
        for case in job.cases
    ]


def report(rows: Sequence[Row], times: dict[str, StepTimes], ranks: int, probe_s: float | None = None) -> list[str]:
    """Print the table; return the bars that were missed."""
    print("| layout | measured, ms | predicted, ms | error |\n|---|---|---|---|")
    for row in sorted(rows, key=lambda row: row.measured_s):
        print(f"| {row.name} | {1e3 * row.measured_s:.0f} | {1e3 * row.predicted_s:.0f} | {row.error:+.1%} |")
    found = figures_of(rows)
    busy = statistics.mean(each.busy_share for each in times.values())
    print(
        f"median error {found.median:.1%}, worst {found.worst:.1%}, chosen {found.chosen}: {found.regret:+.1%} over "
        f"the fastest ({found.fastest}); rank correlation {found.correlation:.3f}"
    )
    print(f"other processes held the cores for {busy:.0%} of the time")
    speeds = [probe_s / statistics.median(each.probes) for each in times.values() if probe_s and each.probes]
    if speeds:
        print(f"beside the layouts cores had {min(speeds):.0%} to {max(speeds):.0%} of the calibration's speed")
    if ranks > 2:
        return [f"rank correlation {found.correlation:.3f}"] if found.correlation < CORRELATION else []
    missed = [f"median error {found.median:.1%}"] if found.median > MEDIAN else []
    missed += [f"worst error {found.worst:.1%}"] if found.worst > WORST else []
    return missed + ([f"chosen layout {found.regret:+.1%} over the fastest"] if found.regret > REGRET else [])


class Figures(NamedTuple):
    """Errors of the layouts of a case, their rank correlation, and the chosen layout's time over the fastest."""

    median: float
    worst: float
    correlation: float
    regret: float
    chosen: str
    fastest: str


def figures_of(rows: Sequence[Row]) -> Figures:
    errors = [abs(row.error) for row in rows]
    chosen = min(rows, key=lambda row: row.predicted_s)
    fastest = min(rows, key=lambda row: row.measured_s)
    correlation = rank_correlation([row.predicted_s for row in rows], [row.measured_s for row in rows])
    regret = chosen.measured_s / fastest.measured_s - 1
    return Figures(statistics.median(errors), max(errors), correlation, regret, chosen.name, fastest.name)


def rank_correlation(some: Sequence[float], others: Sequence[float]) -> float:
    """Return Spearman's correlation of two lists without ties."""
    places = [{value: place for place, value in enumerate(sorted(values))} for values in (some, others)]
    squares = sum((places[0][a] - places[1][b]) ** 2 for a, b in zip(some, others, strict=True))
    return 1 - 6 * squares / (len(some) * (len(some) ** 2 - 1))


def conclude(
    title: str, job: Job, ranks: int, options: argparse.Namespace, result: Any, *, on_machine: bool = True
) -> tuple[list[str], str]:
    """Calibrate, predict and print; return the missed bars with the title, and the case's row of the page."""
    found, times = result
    if found is None or job.plan is None:
        cluster = load_cluster(options.cluster)
    else:
        # On a link each rank is pinned to a core, and knows no other.
        measured = dataclasses.replace(found.measurements, cores=usable_cores() if on_machine else ranks)
        cluster, observations = calibrate(Found(measured, found.steps), job.plan, title.replace(" ", "-"))
        print("\n".join(fit_lines(cluster, observations)))
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
            (options.keep / f"{cluster.name}.toml").write_text(cluster_text(cluster))
    probe_s = median_probe_s(times.values()) if found is None else found.probe_s
    rows = rows_of(job, cluster, times, probe_s)
    if options.keep is not None:
        content = json.dumps([row._asdict() for row in rows], indent=1)
        (options.keep / f"{title.replace(' ', '-')}.json").write_text(content + "\n")
    print(f"\n{title}: GPT of {job.size}, {job.size.num_sequences} sequences a step")
    missed = [f"{title}: {text}" for text in report(rows, times, ranks, probe_s)]
    found = figures_of(rows)
    cells = [f"{found.median:.1%}", f"{found.worst:.1%}", f"{found.correlation:.2f}", f"{found.regret:.1%}"]
    return missed, f"| {title} | {len(rows)} | {job.rounds} | {' | '.join(cells)} |"


def keep(name: str, rows: list[str], command: str) -> None:
    """Keep the rows of all cases in docs/results, and show them in docs/planner.md."""
    tables = MeasuredTables(DOCS / "results" / f"{name}.json", DOCS / "planner.md", command)
    tables.add(name.replace("_", " "), [HEAD, *rows], printed=True)
    tables.write()


def run_on_the_link(rank: int, folder: Path, options: argparse.Namespace) -> None:
    """Run the cases of each rate on a rank in its namespace."""
    number = itertools.count()
    missed, rows = [], []

    def run(function: Callable[..., Any], *words: Any) -> Any:
        """Call the function in a fork of this process, which joins the fork of the other rank."""
        mine = folder / f"call-{next(number)}"
        mine.mkdir(exist_ok=True)
        child = os.fork()
        if child == 0:
            join(rank, mine, real_time=False)
            result = function(rank, 2, *words)
            (mine / f"result-{rank}").write_bytes(pickle.dumps(result))
            dist.barrier()
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"rank {rank}: {function.__name__} failed")
        return pickle.loads((mine / f"result-{rank}").read_bytes())

    for rate in options.rates:
        if rank == 0:
            HOSTS.limit(rate)
        job = job_of(2, options)
        result = run_job(job, run, prints=rank == 0)
        if rank == 0:
            late, row = conclude(f"2 ranks at {rate} Mbit", job, 2, options, result, on_machine=False)
            missed, rows = missed + late, [*rows, row]
    if rank == 0 and options.write:
        keep("predicted_on_links", rows, "make bench-predicted ARGS='--ranks --rates 200 1000 --write'")
    if missed and not options.quick:
        sys.exit(f"missed: {'; '.join(missed)}")


def job_of(ranks: int, options: argparse.Namespace) -> Job:
    size = SIZES["tiny" if options.quick else options.size]
    if options.quick:
        size = dataclasses.replace(size, num_sequences=8)
    cases = tuple(case for case in cases_of(ranks) if not options.layouts or case.name in options.layouts)
    plan = None
    if options.cluster is None:
        configs = calibration_configs("cpu", ranks)
        plan = Plan("cpu", CPU_SIZES, {name: configs[name] for name in list(configs)[:: 3 if options.quick else 1]})
    return Job(size, cases, 1 if options.quick else options.rounds, plan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4], choices=[2, 4], help="on this machine")
    parser.add_argument("--rates", type=int, nargs="*", default=[], help="links of this many Mbit/s (root)")
    parser.add_argument("--size", choices=[name for name in SIZES if name != "tiny"], default="small")
    parser.add_argument("--layouts", nargs="+", metavar="LAYOUT")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each layout")
    parser.add_argument("--cluster", type=Path, help="a file of calibrate, instead of a calibration for each case")
    parser.add_argument("--keep", type=Path, help="a folder for cluster files and figures")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that everything runs")
    parser.add_argument("--write", action="store_true", help="keep the errors in docs/results, for docs/planner.md")
    parser.add_argument("--limit-s", type=float, default=1800.0)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return run_on_the_link(options.rank, options.folder, options)
    missed, rows = [], []
    for ranks in options.ranks:
        job = job_of(ranks, options)

        def run(function: Callable[..., Any], *words: Any, ranks: int = ranks) -> Any:
            return run_on_ranks(function, ranks, *words, timeout_s=options.limit_s)[0]

        late, row = conclude(f"{ranks} ranks", job, ranks, options, run_job(job, run))
        missed, rows = missed + late, [*rows, row]
    if rows and options.write:
        keep("predicted_steps", rows, "make bench-predicted ARGS=--write")
    if options.rates:
        reason = missing(("ip", "tc"))
        if reason is not None:
            print(f"--rates skipped: {reason}")
        else:
            run_on_link(HOSTS, "bench-predicted", __file__, options.rates[0], options.limit_s)
    sys.exit(f"missed: {'; '.join(missed)}" if missed and not options.quick else 0)


if __name__ == "__main__":
    main()
