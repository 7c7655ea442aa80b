"""Pipeline parallelism: schedules as data, their rules, simulation and pictures, and what runs them. Knows no model.

Only the executor imports torch.
"""

import importlib
from typing import TYPE_CHECKING

from fused_megatron.pipeline.schedule.action import Action, Schedule, loop_placement, parse_action, v_placement
from fused_megatron.pipeline.schedule.findings import RULES, Finding
from fused_megatron.pipeline.schedule.lowering import lower
from fused_megatron.pipeline.schedule.schedule_checks import check_schedule
from fused_megatron.pipeline.schedule.schedules import SCHEDULES, build_schedule
from fused_megatron.pipeline.view.simulation import Costs, Timeline, simulate

if TYPE_CHECKING:
    from fused_megatron.pipeline.run.executor import PipelineExecutor
    from fused_megatron.pipeline.run.faults import PipelineError

__all__ = [
    "RULES",
    "SCHEDULES",
    "Action",
    "Costs",
    "Finding",
    "PipelineError",
    "PipelineExecutor",
    "Schedule",
    "Timeline",
    "build_schedule",
    "check_schedule",
    "loop_placement",
    "lower",
    "parse_action",
    "simulate",
    "v_placement",
]

# What needs torch, and so is imported when it is first used.
_LAZY = {"PipelineError": "run.faults", "PipelineExecutor": "run.executor"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"fused_megatron.pipeline.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
