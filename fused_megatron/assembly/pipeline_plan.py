"""Pipeline schedule of a run, chosen and checked from the config without any communication."""

from dataclasses import dataclass
from functools import lru_cache

from fused_megatron.checks import InputError, check, found_on_every_rank
from fused_megatron.config import TrainConfig
from fused_megatron.data_parallel.placement import ZERO_STAGES
from fused_megatron.models.stage_cut import StageSpan, check_cut, cut_stages
from fused_megatron.pipeline.schedule.action import SYNCHRONOUS, Schedule, peak_weight_versions
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

    @property
    def is_asynchronous(self) -> bool:
        """Whether steps overlap and the update rule is another one (PipeDream, PipeDream-2BW)."""
        return SCHEDULES[self.name].weights != SYNCHRONOUS

    def weight_versions(self) -> list[int]:
        """Return for each rank the versions of the weights that it keeps; 1 with a synchronous schedule."""
        num_ranks = max(self.placement) + 1
        return peak_weight_versions(self.schedule(num_ranks)) if self.is_asynchronous else [1] * num_ranks

    def schedule(self, num_microbatches: int) -> Schedule:
        """Build the schedule of one step, with compute actions only."""
        num_ranks = max(self.placement) + 1
        return build_schedule(self.name, num_ranks, num_microbatches, self.num_stages // num_ranks, tied=self.tied)

    def most_overlapping(self, num_microbatches: int) -> int:
        """Return the number of steps that fill the pipeline: as many as are under way at once, and one more."""
        return 1 + -(-(max(self.placement) + 1) // num_microbatches)

    def lowered_schedule(self, num_microbatches: int) -> Schedule:
        """Build the schedule of one step, with messages, reductions and gathers of sharded weights."""
        return lower(self.schedule(num_microbatches), self.max_unsharded, self.reduce_each_microbatch)


def plan_pipeline(config: TrainConfig, asynchronous: bool = False) -> PipelinePlan:
    """Choose the schedule that config asks for.

    Args:
        config: of a run.
        asynchronous: whether the caller allows schedules that change the update rule.

    Raises:
        SharedInputError: the schedule is unknown, or asynchronous where that is not allowed or does not fit the config;
            it does not allow this number of stages, or there are more stages than blocks, or pipeline_cut does not fit.
    """
    with found_on_every_rank():
        return _plan(config, asynchronous)


def stage_spans(config: TrainConfig, plan: PipelinePlan) -> tuple[StageSpan, ...]:
    """Return the span of blocks of each pipeline stage. Raises InputError as cut_stages."""
    return cut_stages(config.model, plan.num_stages, config.parallel.pipeline_cut, placement=plan.placement)


def _plan(config: TrainConfig, asynchronous: bool) -> PipelinePlan:
    parallel = config.parallel
    name = parallel.schedule or ("1f1b" if (parallel.stages_per_rank or 1) == 1 else "interleaved_1f1b")
    num_ranks = parallel.pipeline_parallel_size
    schedule = _smallest(name, num_ranks, parallel.stages_per_rank)
    if schedule.weights != SYNCHRONOUS:
        if not asynchronous:
            others = ", ".join(other for other, kind in SCHEDULES.items() if kind.weights == SYNCHRONOUS)
            raise InputError(
                f"schedule={name!r} changes the update rule: only train and dry-run take it; here one of: {others}"
            )
        check_overlapping_steps(config, name)
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


def check_overlapping_steps(config: TrainConfig, name: str) -> None:
    """Raise InputError, with the way out, where overlapping steps of a stage have no meaning."""
    parallel, training = config.parallel, config.training
    reasons = {
        f"zero_stage={parallel.zero_stage} must be 0 or 1: gradients and weights in shards have one version": (
            (parallel.zero_stage or 0) >= 2
        ),
        "tied_embeddings=True must be false: the first and the last stage update their copies at different times": (
            config.model.tied_embeddings and parallel.pipeline_parallel_size > 1
        ),
        f"num_experts={config.model.num_experts} must not be given: the loads of experts are balanced step by step": (
            config.model.num_experts is not None
        ),
        f"cuda_graphs={training.cuda_graphs!r} must be 'off': a graph reads one version of the weights": (
            training.cuda_graphs != "off"
        ),
        "read_metrics_late=True must be false: the metrics of overlapping steps are read together": (
            training.read_metrics_late
        ),
        f"cluster={training.cluster!r} must not be given: it predicts steps that do not overlap": (
            training.cluster is not None
        ),
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    check(reason is None, f"schedule={name!r}: {reason}")


@lru_cache(maxsize=64)
def _smallest(name: str, num_ranks: int, stages_per_rank: int | None) -> Schedule:
    """Build the schedule of a microbatch a rank, which has the placement of its stages; a search asks often."""
    return build_schedule(name, num_ranks, num_ranks, stages_per_rank)


def _max_unsharded(name: str, schedule: Schedule, zero_gather: str) -> int | None:
    if zero_gather == "block":  # the blocks of a stage are gathered one by one
        return None
    return 2 if name == "looped_breadth_first" else schedule.num_stages // (max(schedule.placement) + 1)
