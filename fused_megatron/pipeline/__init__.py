"""Pipeline parallelism: schedules as data, their rules, simulation and pictures. Knows no model, imports no torch."""

from fused_megatron.pipeline.findings import RULES, Finding
from fused_megatron.pipeline.lowering import lower
from fused_megatron.pipeline.schedule import Action, Schedule, loop_placement, parse_action, v_placement
from fused_megatron.pipeline.schedule_checks import check_schedule
from fused_megatron.pipeline.schedules import SCHEDULES, build_schedule
from fused_megatron.pipeline.simulation import Costs, Timeline, simulate

__all__ = [
    "RULES",
    "SCHEDULES",
    "Action",
    "Costs",
    "Finding",
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
