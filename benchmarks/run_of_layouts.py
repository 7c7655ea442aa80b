"""Shared parts of end_to_end.py and layers.py: options, limits of the machine, and the results file."""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from steps_on_ranks import start_rank

from fused_megatron.benchmarking.comparison_table import one_line, remarks
from fused_megatron.benchmarking.report.describe_run import describe_run
from fused_megatron.benchmarking.report.results_file import Results, read_results, write_results
from fused_megatron.benchmarking.side_by_side import OURS, Comparison
from fused_megatron.benchmarking.timing_devices import CpuDevice, measure_ceilings
from fused_megatron.checks import InputError
from fused_megatron.observe.processor import processor_name
from fused_megatron.testing import run_on_ranks

RESULTS = Path(__file__).parent / "results"
GEMM = "gemm_gflop_per_s float32"
# The result of a case: its comparisons, and False if Ctrl-C ended it.
Case = Callable[[], tuple[list[Comparison], bool]]


def parser_of(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="7, or 3 with --short")
    parser.add_argument("--limit-s", type=float, default=900.0, help="limit of one case")
    parser.add_argument("--short", action="store_true", help="the part of make bench: about a minute")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds, to check that everything runs")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="results file; by default in benchmarks/results, for a run of all cases or with --short",
    )
    parser.add_argument(
        "--add-to",
        type=Path,
        metavar="FILE",
        help="results file of this machine, in which the new measurements replace the same cases",
    )
    return parser


def rounds_of(options: argparse.Namespace) -> int:
    return options.rounds or (2 if options.quick else 3 if options.short else 7)


def threads_of(ranks: int) -> int:
    """Return the threads of each rank: its share of the cores, at least one."""
    return max(1, (os.cpu_count() or 1) // ranks)


def run_cases(
    theme: str, options: argparse.Namespace, cases: Iterable[Case], worlds: Iterable[int], *, whole: bool
) -> None:
    """Run the cases one after the other, write the file after each, and end the process.

    Args:
        theme: theme of the results file.
        options: parsed options of parser_of.
        cases: functions that run a case.
        worlds: numbers of ranks in the cases.
        whole: whether these are all cases of the benchmark.
    """
    results, path = begin(theme, options, whole)
    try:
        results.ceilings |= ceilings(sorted(set(worlds)), options.quick)
        finished = all(keep(results, path, *case(), verdicts=not options.quick) for case in cases)
    except KeyboardInterrupt:
        finished = False
    results.complete = finished
    if path is not None and results.comparisons:
        write_results(results, path)
    print()
    for line in remarks(results.comparisons):
        print(line)
    if path is not None and results.comparisons:
        print(f"fused-megatron report {os.path.relpath(path)}   shows this again, and plots")
    if not finished:
        sys.exit(f"interrupted: what was measured is kept in {path}" if path else "interrupted")
    wrong = [c.name for c in results.comparisons if OURS in c.faults]
    sys.exit(f"ours has no figure for: {', '.join(wrong)}" if wrong else 0)


def begin(theme: str, options: argparse.Namespace, whole: bool) -> tuple[Results, Path | None]:
    device = CpuDevice(processor_name() or platform.machine())
    threads = "all cores, shared among the ranks of a layout"
    results = describe_run(theme, device, threads=threads, malloc="keeps its pages for all")
    if options.add_to is not None:
        if options.add_to.exists():
            results = same_machine(results, options.add_to)
        return results, options.add_to
    default = RESULTS / results.file_name if whole and not options.quick else None
    return results, options.results or default


def same_machine(now: Results, path: Path) -> Results:
    """Read the results file to which new results are added; it must be from the same machine."""
    try:
        before = read_results(path)
    except InputError as error:
        sys.exit(str(error))
    for name in ("theme", "hardware"):
        if getattr(before, name) != getattr(now, name):
            sys.exit(f"{path} is of another {name}: {getattr(before, name)!r}, not {getattr(now, name)!r}")
    if before.settings != now.settings:
        changed = [name for name in now.settings if before.settings.get(name) != now.settings[name]]
        sys.exit(f"{path} was measured otherwise: {', '.join(changed)} (measure all again)")
    return before


def keep(
    results: Results, path: Path | None, comparisons: list[Comparison], go_on: bool, *, verdicts: bool = True
) -> bool:
    names = {c.name for c in comparisons}
    results.comparisons = [c for c in results.comparisons if c.name not in names] + comparisons
    for comparison in comparisons:
        print(one_line(comparison, verdicts=verdicts), flush=True)
        for provider, parts in comparison.breakdown.items():
            shown = ", ".join(f"{part} {1e3 * seconds:.3g}" for part, seconds in parts.items())
            print(f"  {provider}: {1e3 * sum(parts.values()):.3g} ms: {shown}", flush=True)
    if path is not None:
        results.complete = False
        write_results(results, path)
    return go_on


def ceilings(worlds: list[int], quick: bool) -> dict[str, float]:
    """Measure the limits of one rank while all ranks compute, by number of ranks; keys without a number are for two."""
    found: dict[str, float] = {}
    for world in worlds:
        ranks = run_on_ranks(ceilings_of_rank, world, threads_of(world), quick)
        slowest = {name: min(rank[name] for rank in ranks) for name in ranks[0]}
        found[f"{GEMM}, {world} rank{'s' * (world > 1)}"] = slowest[GEMM]
        if world == 2 or len(worlds) == 1:
            found |= slowest
    return found


def ceilings_of_rank(rank: int, world_size: int, threads: int, quick: bool) -> dict[str, float]:
    start_rank(threads)
    return measure_ceilings(CpuDevice(), (torch.float32,), quick=quick)
