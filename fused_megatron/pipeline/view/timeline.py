"""Drawing of timelines as text, as SVG, and as a trace for Perfetto (ui.perfetto.dev)."""

import json
from collections.abc import Mapping
from xml.sax.saxutils import escape

from fused_megatron.pipeline.schedule.action import Kind
from fused_megatron.pipeline.view.simulation import Event, Timeline

# Colours that stay apart in print and for most colour-blind readers; a rank's later stages are darker.
_COLOURS = {
    Kind.FORWARD: ("#a6cee3", "#6baed6", "#4292c6", "#2171b5"),
    Kind.BACKWARD: ("#b2df8a", "#8cc563", "#6aa84f", "#4b8b3b"),
    Kind.INPUT_GRAD: ("#b2df8a", "#8cc563", "#6aa84f", "#4b8b3b"),
    Kind.WEIGHT_GRAD: ("#fdd49e", "#fdbb84", "#fc9d59", "#ef8a4a"),
    Kind.REDUCE_GRAD: ("#cab2d6",),
    Kind.REDUCE_TIED: ("#cab2d6",),
    Kind.UPDATE: ("#999999",),
}
_LEGEND = {
    Kind.FORWARD: "F forward",
    Kind.BACKWARD: "B backward, or I input gradient",
    Kind.WEIGHT_GRAD: "W weight gradient",
    Kind.UPDATE: "update",
}


def to_text(timeline: Timeline) -> str:
    """Draw a timeline as text: a row for each rank, a column for each unit of time (the shortest action).

    `2F0` is stage, kind, microbatch; `--` continues an action; `.` is idle. Actions without duration are not drawn.
    """
    timed = [event for events in timeline.events for event in events if event.end > event.start]
    unit = min((event.end - event.start for event in timed), default=1.0)
    columns = max((round(event.end / unit) for event in timed), default=0)
    width = max([len(str(event.action)) for event in timed] + [2])
    lines = []
    for rank, events in enumerate(timeline.events):
        cells = ["."] * columns
        for event in events:
            first, end = round(event.start / unit), round(event.end / unit)
            if event.end > event.start:
                cells[first:end] = [str(event.action), *["-" * width] * (end - first - 1)][: end - first]
        lines.append(f"rank {rank}  " + " ".join(cell.ljust(width) for cell in cells).rstrip())
    return "\n".join(lines) + "\n"


def summary(timeline: Timeline, stages_per_rank: int = 1) -> str:
    """Return a table: makespan, bubble, and for each rank busy time, idle time and peak of live activations."""
    share = timeline.bubble / timeline.makespan if timeline.makespan else 0.0
    lines = [f"makespan {timeline.makespan:g}, bubble {timeline.bubble:g} ({share:.1%} of it)", ""]
    lines.append(f"{'rank':>4}  {'busy':>8}  {'idle':>8}  {'live activations':>16}  {'in microbatches':>15}")
    for rank, (busy, peak) in enumerate(zip(timeline.busy, timeline.peak_live, strict=True)):
        idle = timeline.makespan - busy
        lines.append(f"{rank:>4}  {busy:>8g}  {idle:>8g}  {peak:>16}  {peak / stages_per_rank:>15g}")
    legend = (
        "live activations: peak number, each of one stage and one microbatch; in microbatches: divided by the rank's "
        "stages"
    )
    return "\n".join([*lines, "", legend]) + "\n"


def to_svg(timeline: Timeline, width: int = 1000) -> str:
    """Draw a timeline as SVG: a row for each rank, a box with the microbatch for each action.

    Later stages of a rank are darker.
    """
    return _svg(timeline.name, {"": timeline}, width)


def to_svg_page(title: str, timelines: Mapping[str, Timeline], width: int = 1000) -> str:
    """Draw timelines below each other as one SVG, on the same scale of time, each under its name."""
    return _svg(title, timelines, width)


def _svg(title: str, timelines: Mapping[str, Timeline], width: int) -> str:
    row, left, top, heading = 26, 54, 8, 20
    scale = (width - left - 10) / (max((t.makespan for t in timelines.values()), default=0.0) or 1.0)
    parts: list[str] = []
    y = top
    for label, timeline in timelines.items():
        if label:
            parts.append(f'<text x="6" y="{y + 13}" font-weight="bold">{escape(label)}</text>')
            y += heading
        for rank, events in enumerate(timeline.events):
            stages = sorted({event.action.stage for event in events})
            parts.append(f'<text x="6" y="{y + 16}">rank {rank}</text>')
            parts.append(f'<rect x="{left}" y="{y}" width="{width - left - 10}" height="{row - 4}" fill="#f2f2f2"/>')
            parts += [_box(event, stages.index(event.action.stage), left, y, row - 4, scale) for event in events]
            y += row
    used = {event.action.kind for timeline in timelines.values() for events in timeline.events for event in events}
    used |= {Kind.BACKWARD} if Kind.INPUT_GRAD in used else set()
    x, y = left, y + 10
    for kind, label in _LEGEND.items():
        if kind in used:
            parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{_COLOURS[kind][0]}" stroke="#555"/>')
            parts.append(f'<text x="{x + 17}" y="{y + 10}">{label}</text>')
            x += 36 + 6 * len(label)
    height = y + 24
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def _box(event: Event, local_stage: int, left: int, y: int, height: int, scale: float) -> str:
    colours = _COLOURS[event.action.kind]
    x, width = left + event.start * scale, (event.end - event.start) * scale
    fill = colours[min(local_stage, len(colours) - 1)]
    box = f'<rect x="{x:.1f}" y="{y}" width="{max(width, 3):.1f}" height="{height}" fill="{fill}" '
    box += 'stroke="#555" stroke-width="0.5">'
    box += f"<title>{event.action}: {event.start:g} to {event.end:g}</title></rect>"
    label = str(event.action.index) if event.action.index is not None else ""
    if width < 6 * len(label) + 1:
        return box
    return box + f'<text x="{x + width / 2:.1f}" y="{y + 15}" text-anchor="middle">{label}</text>'


def to_perfetto(timelines: Mapping[str, Timeline], microseconds_per_unit: float = 1000.0) -> str:
    """Return a trace in Chrome's JSON format, with a process for each timeline and a thread for each rank.

    Several timelines (predicted, measured) are drawn below each other.
    """
    events: list[dict[str, object]] = []
    for process, (label, timeline) in enumerate(timelines.items()):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": label}})
        for rank, row in enumerate(timeline.events):
            events.append(
                {"ph": "M", "name": "thread_name", "pid": process, "tid": rank, "args": {"name": f"rank {rank}"}}
            )
            for event in row:
                stage, kind, index = event.action
                box = {"ph": "X", "name": str(event.action), "cat": kind, "pid": process, "tid": rank}
                box["ts"] = event.start * microseconds_per_unit
                box["dur"] = (event.end - event.start) * microseconds_per_unit
                # Every kind uses the field "microbatch" for its index, also a tied group or an update.
                box["args"] = {"stage": stage, "microbatch": index}
                events.append(box)
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n"
