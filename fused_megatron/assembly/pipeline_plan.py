"""Pipeline schedule of a run, chosen and checked from the config without any communication."""

from dataclasses import dataclass

from fused_megatron.checks import InputError, found_on_every_rank
from fused_megatron.config import TrainConfig
from fused_megatron.data_parallel.placement import ZERO_STAGES
from fused_megatron.models.stage_cut import StageSpan, check_cut, cut_stages
from fused_megatron.pipeline.schedule.action import SYNCHRONOUS, Schedule
from fused_megatron.pipeline.schedule.lowering import lower
from fused_megatron.pipeline.schedule.schedules import SCHEDULES, build_schedule


@dataclass(frozen=True)
class PipelinePlan:
    """Schedule of a pipeline for any number of microbatches; a single rank counts as a pipeline of one stage.

    Attributes:
        name: key of pipeline.SCHEDULES.
        placement: the pipeline rank of each stage.
        tied: groups of stages that share a weight, as in Schedule.
        reduce_each_microbatch, max_unsharded: as in lower().
    """

    name: str
    placement: tuple[int, ...]
    tied: tuple[tuple[int, ...], ...]
    reduce_each_microbatch: bool = False
    max_unsharded: int | None = None

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    def schedule(self, num_microbatches: int) -> Schedule:
        """Build the schedule of one step, with compute actions only."""
        num_ranks = max(self.placement) + 1
        return build_schedule(self.name, num_ranks, num_microbatches, self.num_stages // num_ranks, tied=self.tied)

    def lowered_schedule(self, num_microbatches: int) -> Schedule:
        """Build the schedule of one step, with messages, reductions and gathers of sharded weights."""
        return lower(self.schedule(num_microbatches), self.max_unsharded, self.reduce_each_microbatch)


def plan_pipeline(config: TrainConfig) -> PipelinePlan:
    """Choose the schedule that config asks for.

    Raises:
        SharedInputError: the schedule is unknown or asynchronous, does not allow this number of stages, or there are
            more stages than blocks, or pipeline_cut does not fit.
    """
    with found_on_every_rank():
        return _plan(config)


def stage_spans(config: TrainConfig, plan: PipelinePlan) -> tuple[StageSpan, ...]:
    """Return the span of blocks of each pipeline stage. Raises InputError as cut_stages."""
    return cut_stages(config.model, plan.num_stages, config.parallel.pipeline_cut, placement=plan.placement)


def _plan(config: TrainConfig) -> PipelinePlan:
    parallel = config.parallel
    name = parallel.schedule or ("1f1b" if (parallel.stages_per_rank or 1) == 1 else "interleaved_1f1b")
    num_ranks = parallel.pipeline_parallel_size
    schedule = build_schedule(name, num_ranks, num_ranks, parallel.stages_per_rank)
    if schedule.weights != SYNCHRONOUS:
        others = ", ".join(other for other, kind in SCHEDULES.items() if kind.weights == SYNCHRONOUS)
        raise InputError(f"schedule={name!r} changes the update rule; the trainer runs those that do not: {others}")
    check_cut(config.model.num_layers, schedule.num_stages, parallel.pipeline_cut)
    last = schedule.num_stages - 1
    placements = ZERO_STAGES[parallel.zero_stage or 0]
    return PipelinePlan(
        name,
        schedule.placement,
        ((0, last),) if config.model.tied_embeddings and last > 0 else (),
        reduce_each_microbatch=placements.gradients,
        max_unsharded=_max_unsharded(name, schedule, parallel.zero_gather) if placements.weights else None,
    )


def _max_unsharded(name: str, schedule: Schedule, zero_gather: str) -> int | None:
    if zero_gather == "block":  # the blocks of a stage are gathered one by one
        return None
    return 2 if name == "looped_breadth_first" else schedule.num_stages // (max(schedule.placement) + 1)
