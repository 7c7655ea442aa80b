"""Files of timelines in Chrome's trace format: they open in ui.perfetto.dev, and `fused-megatron report` draws them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from fused_megatron.checks import InputError
from fused_megatron.durable import replace_file
from fused_megatron.pipeline.schedule.action import Action, Kind
from fused_megatron.pipeline.view.simulation import Event, Timeline
from fused_megatron.pipeline.view.timeline import to_perfetto
from fused_megatron.untrusted_files import ShownText, convert, parse_json, read_bounded

_MICROSECONDS = 1e6
_MOST_BYTES = 256 << 20
_Time = Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]
_Index = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]


class _Event(msgspec.Struct):
    """Fields that are read from an event of a trace."""

    ph: ShownText
    pid: _Index = 0
    tid: _Index = 0
    ts: _Time = 0.0
    dur: Annotated[float, msgspec.Meta(ge=0, le=1e15)] = 0.0
    cat: ShownText = ""
    name: ShownText = ""
    args: dict[str, Any] = {}


class _Place(msgspec.Struct):
    """Arguments of an action's event."""

    stage: _Index
    microbatch: _Index | None = None


class _Trace(msgspec.Struct):
    traceEvents: list[_Event]


def write_trace(timelines: Mapping[str, Timeline], path: Path) -> None:
    """Replace the file by a trace of these timelines, by name; their times are in seconds.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        replace_file(path, to_perfetto(timelines, _MICROSECONDS).encode())
    except OSError as error:
        raise InputError(f"trace={path}: {error.strerror or error}") from None


def read_trace(path: Path) -> dict[str, Timeline]:
    """Read the timelines of a file that write_trace wrote, by name; times in seconds.

    Raises:
        InputError: the file is missing, too large, or no such trace.
    """
    try:
        trace = parse_json(read_bounded(path, _MOST_BYTES), _Trace)
        return _timelines(trace)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (InputError, ValueError) as error:
        raise InputError(f"{path} is no trace of timelines: {error}") from None


def _timelines(trace: _Trace) -> dict[str, Timeline]:
    names: dict[int, str] = {}
    rows: dict[int, dict[int, list[Event]]] = {}
    for event in trace.traceEvents:
        if event.ph == "M" and event.name == "process_name":
            names[event.pid] = convert(event.args.get("name"), ShownText)
            rows[event.pid] = {}
        elif event.ph == "M" and event.name == "thread_name" and event.pid in rows:
            rows[event.pid][event.tid] = []
        elif event.ph == "X" and event.tid in rows.get(event.pid, {}):
            place = convert(event.args, _Place)
            start = event.ts / _MICROSECONDS
            action = Action(place.stage, Kind(event.cat), place.microbatch)
            rows[event.pid][event.tid].append(Event(action, start, start + event.dur / _MICROSECONDS))
    return {
        names[pid]: Timeline(names[pid], tuple(tuple(of_rank) for _, of_rank in sorted(ranks.items())))
        for pid, ranks in rows.items()
    }
