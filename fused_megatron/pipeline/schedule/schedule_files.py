"""Files of schedules: JSON for a whole schedule, and the CSV of torch.distributed.pipelining for its actions."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any

import msgspec

from fused_megatron.checks import InputError
from fused_megatron.pipeline.schedule.action import (
    COMPUTE,
    RECEIVES,
    SENDS,
    Action,
    Kind,
    Schedule,
    num_ranks_of,
    parse_action,
)
from fused_megatron.untrusted_files import convert, parse_json

_ADDED_BY_LOWERING = (*SENDS, *RECEIVES, Kind.REDUCE_GRAD, Kind.REDUCE_TIED)
# Actions that torch does not have.
_NOT_IN_TORCH = (Kind.REDUCE_TIED, Kind.UPDATE)

# Bounds beyond any machine, since checks count up to the numbers in a file.
_Rank = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class _Record(msgspec.Struct):
    """JSON of a schedule."""

    name: str
    placement: list[_Rank]
    num_microbatches: _Count
    actions: list[str]
    lowered: bool = False
    num_steps: _Count = 1
    weights: str = ""
    max_live: list[_Rank] | None = None
    tied: list[list[_Rank]] = []


def to_json(schedule: Schedule) -> str:
    """Write a whole schedule as JSON, with one line of actions for each rank."""
    values = {field.name: getattr(schedule, field.name) for field in fields(schedule) if field.name != "actions"}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
    rows = ",\n".join(f"  {json.dumps(' '.join(map(str, actions)))}" for actions in schedule.actions)
    return "{\n" + ",\n".join(lines) + ',\n "actions": [\n' + rows + "\n ]\n}\n"


def from_json(text: str) -> Schedule:
    """Read a schedule that `to_json` wrote.

    Raises:
        InputError: the text is no such JSON.
    """
    try:
        values = parse_json(text, dict[str, Any])
        convert(values, _Record)
        actions = tuple(tuple(parse_action(action) for action in row.split()) for row in values.pop("actions"))
        for name in ("placement", "max_live"):
            if values.get(name) is not None:
                values[name] = tuple(int(value) for value in values[name])
        tied = tuple(tuple(group) for group in values.pop("tied", ()))
        schedule = Schedule(**values, actions=actions, tied=tied)
    except InputError as error:
        raise InputError(f"the JSON of a schedule was expected: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"the JSON of a schedule was expected: {type(error).__name__}: {error!s:.200}") from None
    num_ranks = num_ranks_of(schedule.placement)
    if num_ranks != schedule.num_ranks:
        raise InputError(f"placement names {num_ranks} ranks, and actions has {schedule.num_ranks} rows")
    return schedule


def to_csv(schedule: Schedule) -> str:
    """Write the actions as CSV, one row for each rank and one cell for each action.

    torch.distributed.pipelining reads it as "compute_only", or as "compute_comms" for a lowered schedule, except
    updates and reductions of tied weights, which torch does not have.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(schedule.actions)
    return text.getvalue()


def to_torch_csv(schedule: Schedule) -> str:
    """Write the actions as to_csv, without actions that torch does not have.

    Raises:
        InputError: the schedule is asynchronous, and would be another schedule without its updates.
    """
    if any(action.kind == Kind.UPDATE for actions in schedule.actions for action in actions):
        raise InputError(f"schedule {schedule.name}: torch.distributed.pipelining has no updates within a schedule")
    rows = [[action for action in actions if action.kind not in _NOT_IN_TORCH] for actions in schedule.actions]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def from_csv(text: str, name: str = "csv", tied: Sequence[Sequence[int]] = ()) -> Schedule:
    """Read a schedule from a CSV that to_csv or torch wrote; the forwards define the placement.

    Empty cells (idle) are skipped; an overlapped pair of torch, `(0F3;3B1)OVERLAP_F_B`, becomes its two actions.

    Raises:
        InputError: a cell is no action, or a stage has no F, or F on two ranks.
    """
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    lists = []
    for rank, row in enumerate(rows):
        actions: list[Action] = []
        for position, cell in enumerate(row):
            try:
                actions += _actions_of(cell.strip())
            except InputError as error:
                raise InputError(f"row {rank}, cell {position}: {error}") from None
        lists.append(tuple(actions))
    everything = [action for actions in lists for action in actions]
    if not everything:
        raise InputError("the CSV of a schedule was expected: there is no action in it")
    owners: dict[int, int] = {}
    for rank, row_actions in enumerate(lists):
        for action in row_actions:
            if action.kind == Kind.FORWARD and owners.setdefault(action.stage, rank) != rank:
                raise InputError(f"stage {action.stage} has F on rank {owners[action.stage]} and on rank {rank}")
    stages = range(max(action.stage for action in everything) + 1)
    if missing := [stage for stage in stages if stage not in owners]:
        raise InputError(f"stage {missing[0]} has no F")
    count = 1 + max(action.microbatch for action in everything if action.kind in COMPUTE)
    lowered = any(action.kind in _ADDED_BY_LOWERING for action in everything)
    placement = tuple(owners[stage] for stage in stages)
    groups = tuple(tuple(group) for group in tied)
    return Schedule(name, placement, count, tuple(lists), lowered=lowered, tied=groups)


def _actions_of(cell: str) -> list[Action]:
    if cell.startswith("(") and cell.endswith(")OVERLAP_F_B"):
        return [parse_action(part.strip()) for part in cell[1 : cell.rindex(")")].split(";")]
    return [parse_action(cell)] if cell else []
