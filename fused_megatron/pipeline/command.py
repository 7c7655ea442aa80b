"""Command `fused-megatron schedule`, which shows, checks or simulates a schedule. It needs no torch, and so is fast."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fused_megatron.checks import InputError, check
from fused_megatron.pipeline.schedule.action import SYNCHRONOUS, Schedule, peak_weight_versions
from fused_megatron.pipeline.schedule.lowering import lower
from fused_megatron.pipeline.schedule.schedule_checks import schedule_findings
from fused_megatron.pipeline.schedule.schedule_files import from_csv, from_json, to_csv, to_json, to_torch_csv
from fused_megatron.pipeline.schedule.schedules import SCHEDULES, build_schedule
from fused_megatron.pipeline.view.simulation import Costs, Timeline, simulate
from fused_megatron.pipeline.view.timeline import summary, to_perfetto, to_svg, to_text

Formats = Literal["text", "svg", "perfetto", "csv", "json", "torch_csv"]


@dataclass(frozen=True)
class ScheduleArguments:
    """Show a pipeline schedule, check it by its rules, or simulate it."""

    action: Annotated[Literal["show", "check", "simulate"], tyro.conf.Positional]
    """show: print the timeline; check: check every rule, with exit code 1 for a breach; simulate: print makespan,
    bubble and memory."""
    name: Annotated[str, tyro.conf.Positional]
    """A schedule (gpipe, 1f1b, interleaved_1f1b, looped_breadth_first, zb_h1, interleaved_zero_bubble, zb_v, v_half,
    dual_pipe_v, pipedream_2bw, pipedream), or a file of one (.csv, .json)."""
    ranks: int = 4
    stages_per_rank: int | None = None
    """Default: the least number that the schedule allows."""
    microbatches: int = 8
    """Microbatches of one step."""
    steps: int | None = None
    """Overlapping steps, for pipedream_2bw and pipedream only; default for them: 3."""
    forward: float = 1.0
    """Time of a rank's whole share of a forward; each of its stages takes an equal part."""
    input_grad: float = 1.0
    """Time of a rank's whole share of the input gradients."""
    weight_grad: float = 1.0
    """Time of a rank's whole share of the weight gradients."""
    link_latency: float = 0.0
    """Time from the end of a send to its arrival."""
    link_occupied: float = 0.0
    """Time for which a message blocks its channel for the next message."""
    format: Formats = "text"
    """Format of show."""
    lowered: bool = False
    """csv and json: include sends, receives and reductions."""
    write: Path | None = None
    """File for the output."""


def run_schedule(arguments: ScheduleArguments) -> int:
    """Print or write the output; return the exit code, which is 1 if `check` finds a breach.

    Raises:
        InputError: an unknown name, numbers that the schedule does not allow, a file that is no schedule.
    """
    schedule = _schedule(arguments)
    if arguments.action == "check":
        return _run_check(schedule)
    output = _shown(schedule, arguments) if arguments.action == "show" else _simulated(schedule, arguments)
    if arguments.write is None:
        print(output, end="")
        return 0
    try:
        arguments.write.write_text(output, encoding="utf-8")
    except OSError as error:
        raise InputError(f"write={arguments.write}: {error.strerror}") from None
    return 0


def _schedule(arguments: ScheduleArguments) -> Schedule:
    path = Path(arguments.name)
    readers: dict[str, Callable[[str], Schedule]] = {".csv": from_csv, ".json": from_json}
    if path.suffix in readers:
        try:
            return readers[path.suffix](path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: {error}") from None
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    kind = SCHEDULES.get(arguments.name)
    steps = arguments.steps if arguments.steps is not None else 3 if kind and kind.weights != SYNCHRONOUS else 1
    return build_schedule(arguments.name, arguments.ranks, arguments.microbatches, arguments.stages_per_rank, steps)


def _run_check(schedule: Schedule) -> int:
    findings = schedule_findings(schedule)
    if not findings and not schedule.lowered:
        schedule = lower(schedule)
        findings = schedule_findings(schedule)
    for finding in findings:
        print(finding)
    count = sum(len(actions) for actions in schedule.actions)
    print(f"{schedule.name}: {count} actions on {schedule.num_ranks} ranks, {len(findings) or 'no'} breach(es)")
    return 1 if findings else 0


def _timeline(schedule: Schedule, arguments: ScheduleArguments) -> Timeline:
    share = schedule.num_stages / schedule.num_ranks
    times = (arguments.forward / share, arguments.input_grad / share, arguments.weight_grad / share)
    costs = Costs(*times, link_latency=arguments.link_latency, link_occupied=arguments.link_occupied)
    timeline = simulate(schedule, costs)
    if timeline.stuck:
        rank, position = timeline.stuck[0]
        waits = f"rank {rank} waits forever at position {position}, {schedule.actions[rank][position]}"
        raise InputError(f"schedule {schedule.name} deadlocks: {waits} (see: fused-megatron schedule check)")
    return timeline


def _shown(schedule: Schedule, arguments: ScheduleArguments) -> str:
    if arguments.format in ("csv", "json", "torch_csv"):
        if arguments.lowered and not schedule.lowered:
            schedule = lower(schedule)
        return {"csv": to_csv, "json": to_json, "torch_csv": to_torch_csv}[arguments.format](schedule)
    timeline = _timeline(schedule, arguments)
    if arguments.format == "perfetto":
        return to_perfetto({"predicted": timeline})
    return to_svg(timeline) if arguments.format == "svg" else to_text(timeline)


def _simulated(schedule: Schedule, arguments: ScheduleArguments) -> str:
    check(arguments.format == "text", f"format={arguments.format} is for show; simulate prints text")
    output = summary(_timeline(schedule, arguments), schedule.num_stages // schedule.num_ranks)
    if schedule.weights != SYNCHRONOUS:
        versions = ", ".join(map(str, peak_weight_versions(schedule)))
        output += f"changes the update rule ({schedule.weights}); versions of the weights kept, by rank: {versions}\n"
    return output
