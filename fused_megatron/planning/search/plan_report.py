"""Text and JSON of a search: the best plans, their breakdown, and why other layouts fell."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fused_megatron.config import ParallelConfig
from fused_megatron.models import StageSpan
from fused_megatron.planning.amounts import amount_text
from fused_megatron.planning.command_line import text_table
from fused_megatron.planning.parameter_counts import ParameterCounts, stage_parameters
from fused_megatron.planning.prediction.cluster import Cluster
from fused_megatron.planning.prediction.step_figures import step_figures
from fused_megatron.planning.search.best_layouts import Plan, Search
from fused_megatron.planning.search.fewest_gpus import Fit
from fused_megatron.planning.search.model_source import Workload

_MOST_CLASSES = 6
"""Classes of layouts shown that need too much memory."""


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        workload: model and batch.
        cluster: the machine.
        num_gpus: its GPUs.
        tokens: tokens of the whole training; None: not given.
        price: of a GPU hour; None: not given.
    """

    workload: Workload
    cluster: Cluster
    num_gpus: int
    tokens: int | None = None
    price: float | None = None


def plan_figures(plan: Plan, request: Request) -> dict[str, float | None]:
    """Return the figures of a plan: step_s, tokens_per_s, mfu, memory_gb, and of the training days, gpu_hours, cost."""
    figures = step_figures(plan.config, request.cluster, plan.prediction, request.tokens, request.price)
    return {**figures, "memory_gb": plan.memory_bytes / 1e9}


def describe(search: Search, request: Request) -> str:
    """Return the search as text; there is a plan."""
    lines = [heading(request), "", *_table(search.plans, request), "", *_best(search.plans[0], request)]
    return "\n".join([*lines, "", *why_not(search)])


def heading(request: Request) -> str:
    """Return the line that says what is planned."""
    config, cluster, workload = request.workload.config, request.cluster, request.workload
    nodes = -(-request.num_gpus // cluster.gpus_per_node)
    where = f"{request.num_gpus:,} x {cluster.name}" + (f" ({nodes:,} nodes)" if nodes > 1 else "")
    parameters = f"{amount_text(num_parameters(workload))} parameters, {config.training.weight_dtype}"
    text = (
        f"{workload.name} ({parameters}) on {where}; "
        f"{workload.batch_tokens:,} tokens a step ({config.training.global_batch_size:,} sequences of "
        f"{config.model.seq_len:,})"
    )
    return "\n".join([text, *(f"chosen: {note}" for note in workload.notes)])


def num_parameters(workload: Workload) -> int:
    """Count the parameters of the model, with the padding of its vocabulary."""
    model = workload.config.model
    counts: ParameterCounts = stage_parameters(model, StageSpan(0, 1, 0, model.num_layers), ParallelConfig())
    return counts.total


def why_not(search: Search) -> list[str]:
    """Return the lines on the layouts that are not among the plans, by class."""
    limit = search.limit_bytes / 1e9
    lines = [f"Of {search.num_layouts:,} layouts ({search.num_predicted:,} steps simulated) the others fell:"]
    lines += [f"  {line}" for line in search.refused.lines()]
    classes = sorted(search.too_large.items(), key=lambda item: item[1])
    for (ranks, of_expert), least in classes[:_MOST_CLASSES]:
        shared = f"tp x pp = {ranks}" + (f", ep x etp = {of_expert}" if of_expert > 1 else "")
        lines.append(f"  {shared}: needs at least {least / 1e9:,.0f} GB of {limit:,.0f} GB, with any settings")
    if len(classes) > _MOST_CLASSES:
        more = len(classes) - _MOST_CLASSES
        lines.append(f"  and {more} more {'class that needs' if more == 1 else 'classes that need'} at least as much")
    if search.num_too_large:
        lines.append(f"  too little memory in all: {search.num_too_large:,} layouts")
    if search.num_slower:
        lines.append(f"  slower than the plans above, by a lower bound of their time: {search.num_slower:,} layouts")
    return lines if len(lines) > 1 else []


def does_not_fit(search: Search, request: Request, nearest: Fit | None) -> str:
    """Return the text for a workload that fits in no layout, with the nearest number of GPUs that is enough."""
    if not search.too_large:
        return "\n".join([heading(request), "", "no layout is possible:", *why_not(search)])
    gpus, limit = request.num_gpus, search.limit_bytes / 1e9
    if nearest is None:
        return "\n".join(
            [
                heading(request),
                "",
                f"does not fit on {gpus:,} GPUs, nor on any larger number up to 65,536",
                *why_not(search),
            ]
        )
    text = (
        f"does not fit: needs at least {nearest.num_gpus:,} GPUs of {request.cluster.name}, not {gpus:,}. The nearest "
        f"that fits: {nearest.layout}, every block recomputed, microbatches of 1, ZeRO stage "
        f"{nearest.settings.zero_stage}: {nearest.memory_bytes / 1e9:.1f} GB of {limit:.0f} GB"
    )
    return "\n".join([heading(request), "", text, *why_not(search)])


def _table(plans: Sequence[Plan], request: Request) -> list[str]:
    head = ["", "layout", "schedule", "micro", "recompute", "ZeRO", "step s", "tokens/s", "MFU", "GB"]
    rows = [head + (["days"] if request.tokens is not None else [])]
    for number, plan in enumerate(plans, start=1):
        figures, settings = plan_figures(plan, request), plan.settings
        row = [
            str(number),
            str(plan.layout) + " sp" * settings.sequence_parallel,
            "-" if plan.layout.pp == 1 else settings.schedule + f" x{settings.stages_per_rank}",
            str(settings.microbatch_size),
            settings.recompute + ("" if settings.recompute_blocks is None else f" {settings.recompute_blocks}"),
            str(settings.zero_stage),
            f"{figures['step_s']:.3f}",
            f"{figures['tokens_per_s']:,.0f}",
            f"{figures['mfu']:.1%}",
            f"{figures['memory_gb']:.1f}",
        ]
        rows.append(row + ([f"{figures['days']:,.1f}"] if request.tokens is not None else []))
    return text_table(rows, left=(1, 2, 4))


def _best(plan: Plan, request: Request) -> list[str]:
    """Return the breakdown of the best plan."""
    figures, prediction, memory = plan_figures(plan, request), plan.prediction, plan.memory
    shares = [
        f"{name} {seconds / prediction.seconds:.1%}"
        for name, seconds in prediction.parts.items()
        if abs(seconds) >= 5e-4 * prediction.seconds
    ]
    held = {**memory.parts, **memory.overheads}
    parts = ", ".join(f"{name} {num_bytes / 1e9:.1f}" for name, num_bytes in held.items() if num_bytes >= 5e7)
    bar = f"{prediction.low_s:.3f} to {prediction.high_s:.3f}"
    lines = [
        f"1: {prediction.seconds:.3f} s a step ({bar}): {', '.join(shares)}",
        f"   memory of the fullest rank in GB: {parts}",
    ]
    if figures["days"] is not None and request.tokens is not None:
        text = f"   {amount_text(request.tokens)} tokens: {figures['days']:,.1f} days, "
        text += f"{figures['gpu_hours']:,.0f} GPU hours"
        text += "" if figures["cost"] is None else f", {figures['cost']:,.0f} at {request.price:g} a GPU hour"
        lines.append(text)
    return lines + [f"   outside of the data of the prediction: {each}" for each in prediction.outside]


def as_json(search: Search, request: Request, nearest: Fit | None, extra: dict[str, Any]) -> dict[str, Any]:
    """Return the search for JSON."""
    return {
        "model": request.workload.name,
        "parameters": num_parameters(request.workload),
        "cluster": request.cluster.name,
        "gpus": request.num_gpus,
        "batch_tokens": request.workload.batch_tokens,
        "notes": list(request.workload.notes),
        "fits": bool(search.plans),
        "least_gpus": request.num_gpus if search.plans else None if nearest is None else nearest.num_gpus,
        "plans": [
            {
                **plan.layout._asdict(),
                **plan.settings._asdict(),
                **plan_figures(plan, request),
                "parts_s": plan.prediction.parts,
                "outside": list(plan.prediction.outside),
            }
            for plan in search.plans
        ],
        "layouts": search.num_layouts,
        "simulated": search.num_predicted,
        "why_not": [line.strip() for line in why_not(search)[1:]],
        **extra,
    }
