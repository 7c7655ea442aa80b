"""Pipeline parallelism: schedules as data, their rules, simulation and pictures, and the executor that runs them.

The package knows no model. Only `run/` imports torch.
"""

import importlib
from typing import TYPE_CHECKING

from fused_megatron.deprecation import warn_renamed
from fused_megatron.pipeline.schedule.action import Action, Kind, Schedule, loop_placement, parse_action, v_placement
from fused_megatron.pipeline.schedule.findings import RULES, Finding
from fused_megatron.pipeline.schedule.lowering import lower
from fused_megatron.pipeline.schedule.schedule_checks import schedule_findings
from fused_megatron.pipeline.schedule.schedules import SCHEDULES, build_schedule
from fused_megatron.pipeline.view.simulation import Costs, Timeline, simulate

if TYPE_CHECKING:
    from fused_megatron.pipeline.run.executor import PipelineExecutor
    from fused_megatron.pipeline.run.faults import PipelineError
    from fused_megatron.pipeline.run.stage_hooks import StageFunctions, StageHooks

__all__ = [
    "RULES",
    "SCHEDULES",
    "Action",
    "Costs",
    "Finding",
    "Kind",
    "PipelineError",
    "PipelineExecutor",
    "Schedule",
    "StageFunctions",
    "StageHooks",
    "Timeline",
    "build_schedule",
    "loop_placement",
    "lower",
    "parse_action",
    "schedule_findings",
    "simulate",
    "v_placement",
]

# These need torch, so they are imported at their first use.
_LAZY = {
    "PipelineError": "run.faults",
    "PipelineExecutor": "run.executor",
    "StageFunctions": "run.stage_hooks",
    "StageHooks": "run.stage_hooks",
}


def __getattr__(name: str) -> object:
    if name == "check_schedule":
        warn_renamed(f"{__name__}.check_schedule", "schedule_findings", "0.2")
        return schedule_findings
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"fused_megatron.pipeline.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
