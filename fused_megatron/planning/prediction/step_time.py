"""Prediction of the time of a training step: costs of the stages, played through the simulator of schedules."""

from dataclasses import dataclass, replace

from fused_megatron.assembly.pipeline_plan import plan_pipeline, stage_spans
from fused_megatron.checks import check
from fused_megatron.config import TrainConfig
from fused_megatron.models import StageSpan
from fused_megatron.observe.model_flops import gpt_step_flops
from fused_megatron.pipeline.schedule.action import stages_of
from fused_megatron.pipeline.view.simulation import Costs, Timeline
from fused_megatron.planning.parameter_counts import stage_parameters, vocabulary_elements
from fused_megatron.planning.prediction.action_work import ActionWork, Work
from fused_megatron.planning.prediction.block_time import StageTimes
from fused_megatron.planning.prediction.cluster import Cluster
from fused_megatron.planning.prediction.end_of_step import message_s, reduction_s, tied_s, update_s
from fused_megatron.planning.prediction.engine import OWN, engine_of
from fused_megatron.planning.prediction.fitted_runs import error_share, outside_of_fit
from fused_megatron.planning.prediction.played_schedule import PlayedSchedule, play
from fused_megatron.planning.prediction.shared_cores import cores_of_stages, ends_on_cores, of_one_rank
from fused_megatron.planning.rank_communication import message_bytes, part_gradient_bytes

PARTS = (
    "products",
    "memory-bound ops",
    "launch floor",
    "tensor parallel",
    "context parallel",
    "expert parallel",
    "pipeline bubble",
    "data parallel",
    "optimizer",
    "fixed per step",
)
"""Parts of a step, in the order of reports."""


@dataclass(frozen=True)
class StepPrediction:
    """Predicted time of a training step.

    Attributes:
        seconds: of the step.
        low_s, high_s: the error bar.
        parts: seconds by part, of the rank that works most; they add up to seconds. A rank waits in "pipeline bubble",
            and for transfers between stages.
        played: the simulated schedule.
        outside: in which respects the run lies outside of the runs to which the constants were fitted.
    """

    seconds: float
    low_s: float
    high_s: float
    parts: dict[str, float]
    played: PlayedSchedule
    outside: tuple[str, ...] = ()

    @property
    def timeline(self) -> Timeline:
        """The simulated schedule, in seconds; of a long step only some microbatches."""
        return self.played.timeline


def predict_step(config: TrainConfig, cluster: Cluster, *, engine: str = OWN) -> StepPrediction:
    """Predict the time of a training step.

    Args:
        config: the run; parallel.data_parallel_size and model.vocab_size must be given.
        cluster: the machine.
        engine: key of ENGINES: the program that runs the step.

    Raises:
        InputError: a size that is missing, or a schedule that does not fit.
    """
    return _Step(config, cluster, engine).predict()


def fastest_possible(config: TrainConfig, cluster: Cluster) -> float:
    """Return a lower bound of predict_step: products only, at the efficiency of large products, without a bubble."""
    training, parallel = config.training, config.parallel
    _, flops = gpt_step_flops(config.model, training.global_batch_size * config.model.seq_len, visible_pairs=0)
    gpus = parallel.num_ranks
    return flops / (1e12 * cluster.peak_tflops * cluster.product_efficiency * gpus)


class _Step:
    def __init__(self, config: TrainConfig, cluster: Cluster, name: str) -> None:
        parallel = config.parallel
        check(parallel.data_parallel_size is not None, "data_parallel_size=None must be given to predict a step")
        check(
            config.model.vocab_size is not None,
            "model.vocab_size=None must be given, since a prediction reads no data (--model.vocab-size 50257)",
        )
        self.name, self.engine = name, engine_of(name)
        if not self.engine.scatters_messages:
            config = replace(config, parallel=replace(parallel, scatter_messages=False))
        self.config = config.for_device(cluster.device)
        self.cluster = cluster = of_one_rank(cluster, parallel.num_ranks)
        self.dp = parallel.data_parallel_size or 1
        config.check_data_parallel(self.dp)
        self.plan = plan_pipeline(config)
        self.spans = stage_spans(config, self.plan)
        self.times = StageTimes(self.config, cluster, self.engine)
        self.works = [self.times.of_stage(span) for span in self.spans]

    def predict(self) -> StepPrediction:
        training = self.config.training
        microbatches = training.global_batch_size // training.microbatch_size // self.dp
        played = play(self.plan, self._costs(), microbatches)
        ranks = range(len(played.ends))
        stages = {rank: stages_of(self.plan.placement, rank) for rank in ranks}
        reduced = [
            self._reduction_s([self.spans[s] for s in stages[rank]], [self.works[s] for s in stages[rank]])
            for rank in ranks
        ]
        cores = self._cores
        ends = ends_on_cores(played.ends, reduced, cores)
        tied = self._tied_s()
        if tied:
            ends[0] = ends[-1] = max(ends_on_cores([max(ends[0], ends[-1])] * 2, [tied] * 2, cores))
        # The norm of all gradients is known when the last rank has reduced its own.
        updates = [self._update_s([self.spans[s] for s in stages[rank]]) for rank in ranks]
        total = max(ends_on_cores([max(ends)] * len(ends), updates, cores))
        update = total - max(ends)
        busy = played.busy
        busiest = max(ranks, key=lambda rank: busy[rank])
        work = sum((self.works[s].forward + self.works[s].backward for s in stages[busiest]), Work()) * microbatches
        fixed = 1e-3 * self.cluster.step_ms
        total += fixed
        parts = {
            "products": work.products,
            "memory-bound ops": work.memory_bound,
            "launch floor": max(0.0, busy[busiest] - work.on_device),
            "tensor parallel": work.tensor_parallel,
            "context parallel": work.context_parallel,
            "expert parallel": work.expert_parallel,
            "pipeline bubble": 0.0,
            "data parallel": work.data_parallel + max(ends) - played.makespan,
            "optimizer": update,
            "fixed per step": fixed,
        }
        parts["pipeline bubble"] = max(0.0, total - sum(parts.values()))
        outside = outside_of_fit(self.config, self.cluster, self.name)
        error = error_share(self.cluster, len(outside))
        return StepPrediction(total, total / (1 + error), total * (1 + error), parts, played, outside)

    def _costs(self) -> Costs:
        latency, sent = (
            message_s(self.cluster, self.engine, self.config.parallel, num_bytes)
            for num_bytes in (1, message_bytes(self.config))
        )
        forward, inputs, weights = zip(*(work.seconds(self.cluster.device) for work in self.works), strict=True)
        return Costs(
            forward,
            inputs,
            weights,
            link_latency=latency,
            link_occupied=sent - latency,
            cores=self._cores,
        )

    @property
    def _cores(self) -> float:
        """Pipeline ranks that compute at full speed at once."""
        return cores_of_stages(self.cluster, self.config.parallel.num_ranks, max(self.plan.placement) + 1)

    def _tied_s(self) -> float:
        """Return the seconds of the sum of the gradients of a table that the first and the last rank hold."""
        if not self.config.model.tied_embeddings or not self.plan.tied or self.plan.placement[-1] == 0:
            return 0.0
        elements = vocabulary_elements(self.config.model, self.config.parallel.tensor_parallel_size)
        return tied_s(self.cluster, self.engine, self.config.parallel, elements)

    def _reduction_s(self, spans: list[StageSpan], works: list[ActionWork]) -> float:
        """Return the seconds of gradient reduction and of the gather of updated weights that nothing hides."""
        last_backwards = sum(work.backward.seconds(self.cluster.device) for work in works)
        size, parallel = self.config.training.element_bytes, self.config.parallel
        parts = sum(part_gradient_bytes(self.config, span) for span in spans)
        summed = self.times.tp_ring.all_reduce_s(parts) if parts else 0.0
        return summed + reduction_s(self.cluster, self.engine, parallel, size, self._parameters(spans), last_backwards)

    def _update_s(self, spans: list[StageSpan]) -> float:
        blocks = sum(span.stop - span.start for span in spans)
        return update_s(self.cluster, self.engine, self.config.parallel, self._parameters(spans), blocks)

    def _parameters(self, spans: list[StageSpan]) -> int:
        """Count the parameters of a rank with these stages."""
        return sum(stage_parameters(self.config.model, span, self.config.parallel).total for span in spans)
