"""Measured bubble of every schedule: stages that sleep instead of computing, real messages between real ranks.

    make bench-pipeline
    make bench-pipeline ARGS="--ranks 8 --schedules zb_v v_half --perfetto pipeline.json"

A sleeping rank needs no core, so that 8 of them fit on 2. A stage sleeps for a rank's share of F, I and W, divided by
the rank's number of stages. The simulator predicts a step from these times and a message that takes --message-ms (gloo,
and a rank that wakes up for it). Measured: the whole executor.step() of its slowest rank, the median of the steps.

bubble: the step minus the time that the busiest rank sleeps, in % of the step. messages: the part of the step by which
messages delay it; the rest of the excess is in the actions (Python, autograd, the wait for a core). gloo: the same for
messages as short as gloo's own between two ranks that wake up for them, measured in the same run. activations: the
largest number alive at once, by rank, one for a stage and a microbatch; predicted by the schedule, and counted.
Asynchronous schedules run three steps in one.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch.distributed as dist

from fused_megatron.benchmarking.report.measured_tables import MeasuredTables
from fused_megatron.benchmarking.sleeping_stages import MeasuredSchedule, measure_schedule, message_seconds
from fused_megatron.pipeline import SCHEDULES, Costs, Schedule, build_schedule
from fused_megatron.pipeline.schedule.action import SYNCHRONOUS
from fused_megatron.pipeline.view.timeline import to_perfetto
from fused_megatron.testing import run_on_ranks

BAR = 0.05
# The most points of a step by which the bubble may be larger than predicted, and by which messages may delay a step.
BUBBLE_BAR, MESSAGES_BAR = 0.03, 0.01
# Where gloo's own messages take nearly all of that, messages may delay a step by this times gloo's part.
OVER_GLOO = 2
DOCS = Path(__file__).resolve().parents[1] / "docs"


def schedules_of(names: list[str], ranks: int, microbatches: int, stages_per_rank: int) -> list[Schedule]:
    built = []
    for name in names:
        kind = SCHEDULES[name]
        # A schedule that takes any number of stages runs with several: with one stage it equals another schedule.
        per_rank = kind.stages_per_rank or stages_per_rank
        steps = 1 if kind.weights == SYNCHRONOUS else 3
        built.append(build_schedule(name, ranks, microbatches, per_rank, steps))
    return built


def costs_of(schedule: Schedule, times_ms: list[float], message_ms: float) -> Costs:
    per_rank = schedule.num_stages // schedule.num_ranks
    forward, input_grad, weight_grad = (time / 1e3 / per_rank for time in times_ms)
    return Costs(forward, input_grad, weight_grad, link_latency=message_ms / 1e3)


def measure_all(
    rank: int, world_size: int, schedules: list[Schedule], times_ms: list[float], message_ms: float, steps: int
) -> tuple[float, list[MeasuredSchedule]]:
    measured: list[MeasuredSchedule] = []
    gloo_s = message_seconds(times_ms[0] / 2e3, dist.group.WORLD)
    for schedule in schedules:
        costs = costs_of(schedule, times_ms, message_ms)
        measured.append(measure_schedule(schedule, costs, dist.group.WORLD, steps=steps))
        if rank == 0:
            print(row(schedule, measured[-1], gloo_s), flush=True)
    return gloo_s, measured


def off(result: MeasuredSchedule) -> float:
    """Return the excess over the prediction, as a share."""
    return statistics.median(result.step_s) / result.predicted.makespan - 1


def bubbles(result: MeasuredSchedule) -> tuple[float, float]:
    """Return the share of the step in which the busiest rank does not sleep: predicted, and measured."""
    work = max(result.predicted.busy)
    return 1 - work / result.predicted.makespan, 1 - work / statistics.median(result.step_s)


def row(schedule: Schedule, result: MeasuredSchedule, gloo_s: float) -> str:
    step_s, predicted = statistics.median(result.step_s), result.predicted
    cells = [schedule.name, schedule.num_ranks, schedule.num_stages // schedule.num_ranks, schedule.num_microbatches]
    cells += [f"{1e3 * predicted.makespan:.0f}", f"{1e3 * step_s:.0f}", f"{off(result):+.1%}"]
    shares = (*bubbles(result), result.exposed_messages(schedule), result.least_messages(schedule, gloo_s))
    cells += [f"{share:.1%}" for share in shares]
    cells += [" ".join(map(str, peaks)) for peaks in (predicted.peak_live, result.peak_held)]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--schedules", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument(
        "--stages-per-rank", type=int, default=2, help="stages per rank for schedules that take any number"
    )
    parser.add_argument("--microbatches", type=int, help="default: twice the number of ranks plus one")
    parser.add_argument("--times-ms", type=float, nargs=3, default=[100, 100, 100], metavar=("F", "I", "W"))
    parser.add_argument("--message-ms", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=1, help="measured steps, after a warm-up step")
    parser.add_argument("--perfetto", type=Path, help="a trace of predicted and measured timelines (ui.perfetto.dev)")
    parser.add_argument(
        "--write", action="store_true", help="keep the tables in docs/results, and show them in docs/schedules.md"
    )
    options = parser.parse_args()
    columns = [
        "schedule",
        "p",
        "v",
        "m",
        "predicted, ms",
        "measured, ms",
        "off",
        "bubble predicted",
        "measured",
        "messages",
        "gloo",
    ]
    columns += ["activations predicted", "measured"]
    print("|", " | ".join(columns), "|")
    print("|---" * len(columns) + "|", flush=True)
    traces, late, rows = {}, [], [f"| {' | '.join(columns)} |"]
    for ranks in options.ranks:
        count = options.microbatches or 2 * ranks + 1
        schedules = schedules_of(options.schedules, ranks, count, options.stages_per_rank)
        arguments = (schedules, options.times_ms, options.message_ms, options.steps)
        gloo_s, results = run_on_ranks(measure_all, ranks, *arguments, timeout_s=900)[0]
        for schedule, result in zip(schedules, results, strict=True):
            rows.append(row(schedule, result, gloo_s))
            label = f"{schedule.name}, {ranks} ranks"
            traces |= {f"{label}: predicted": result.predicted, f"{label}: measured": result.measured}
            predicted, measured = bubbles(result)
            if abs(off(result)) > BAR:
                late.append(f"{label}: {off(result):+.1%} from the prediction (bar {BAR:.0%})")
            if measured - predicted > BUBBLE_BAR:
                late.append(f"{label}: bubble {measured:.1%}, predicted {predicted:.1%} (bar {BUBBLE_BAR:.0%} more)")
            messages, least = result.exposed_messages(schedule), result.least_messages(schedule, gloo_s)
            if messages > max(MESSAGES_BAR, OVER_GLOO * least):
                late.append(f"{label}: messages {messages:.1%} (bar {MESSAGES_BAR:.0%}; gloo's own {least:.1%})")
    if options.write:
        tables = MeasuredTables(
            DOCS / "results" / "pipeline.json", DOCS / "schedules.md", "make bench-pipeline ARGS=--write"
        )
        tables.add("bubbles", rows, printed=True)
        tables.write()
    if options.perfetto is not None:
        options.perfetto.write_text(to_perfetto(traces, microseconds_per_unit=1e6))
    if late:
        sys.exit("missed: " + "; ".join(late))


if __name__ == "__main__":
    main()
