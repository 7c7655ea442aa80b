"""Predictions for the machine of a publication, beside its figures."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fused_megatron.benchmarking.report.experiment_results import PublishedFigure
from fused_megatron.checks import InputError
from fused_megatron.config import TrainConfig
from fused_megatron.experiments.catalogue import Case, Experiment, PaperRun, with_dropout
from fused_megatron.observe.model_flops import gpt_step_flops
from fused_megatron.planning.engine_memory import device_memory
from fused_megatron.planning.prediction.cluster import Cluster, load_cluster
from fused_megatron.planning.prediction.engine import OWN
from fused_megatron.planning.prediction.step_time import StepPrediction, predict_step

MEMORY_ERROR = 0.1
"""Error bar of the memory of a GPU as a share: 36 published runs differ by 9.3 % at most (docs/planner.md)."""
_DAY_S = 86400


@dataclass(frozen=True)
class _Predicted:
    """A published run with its predictions."""

    config: TrainConfig
    cluster: Cluster
    step: StepPrediction
    memory_bytes: int
    run: PaperRun
    gb_bytes: float


Range = tuple[float, float, float]


def _memory(predicted: _Predicted) -> Range:
    value = predicted.memory_bytes / predicted.gb_bytes
    return value, value * (1 - MEMORY_ERROR), value * (1 + MEMORY_ERROR)


def _step_ms(predicted: _Predicted) -> Range:
    step = predicted.step
    return 1e3 * step.seconds, 1e3 * step.low_s, 1e3 * step.high_s


def _step_s(predicted: _Predicted) -> Range:
    step = predicted.step
    return step.seconds, step.low_s, step.high_s


def _tflops(predicted: _Predicted) -> Range:
    training, model = predicted.config.training, predicted.config.model
    _, flops = gpt_step_flops(model, training.global_batch_size * model.seq_len)
    each = flops / (1e12 * predicted.config.parallel.num_ranks)
    step = predicted.step
    return each / step.seconds, each / step.high_s, each / step.low_s


def _days(predicted: _Predicted) -> Range:
    config = predicted.config
    steps = (predicted.run.tokens or 0.0) / (config.training.global_batch_size * config.model.seq_len)
    step = predicted.step
    return steps * step.seconds / _DAY_S, steps * step.low_s / _DAY_S, steps * step.high_s / _DAY_S


def _bubble(predicted: _Predicted) -> Range:
    played = predicted.step.played
    share = 1 - max(played.busy) / max(played.ends)
    return 100 * share, 100 * share, 100 * share


FIGURES: dict[str, tuple[str, Callable[[_Predicted], Range]]] = {
    "memory_gb": ("memory, GB", _memory),
    "step_ms": ("step, ms", _step_ms),
    "profile_ms": ("step in a profiler, ms", _step_ms),
    "step_s": ("step, s", _step_s),
    "tflops": ("TFLOP/s a GPU, with recomputation", _tflops),
    "days": ("days of training", _days),
    "bubble_percent": ("bubble of the schedule, %", _bubble),
}
"""Names of published figures, their titles and their predictions."""
_SHOWN = {"memory_gb": None, "step_ms": None}
"""Figures of a run of which none is published."""
OUT_OF_MEMORY = "out_of_memory"
"""Name of a published figure: 1 if the run had too little memory."""
SPEED_UP, EFFICIENCY = "speed_up", "efficiency_percent"
"""Names of published figures relative to the first published run of the experiment."""


def published_figures(experiment: Experiment) -> list[PublishedFigure]:
    """Predict the published runs of an experiment; a run without figures gets memory and time.

    Raises:
        InputError: a config or a machine that does not fit.
    """
    found: list[PublishedFigure] = []
    first: _Predicted | None = None
    for name, run in experiment.paper_runs.items():
        predicted = _predict(experiment, name, run)
        first = first or predicted
        found += _figures(name, run, predicted, first)
    return found


def _predict(experiment: Experiment, name: str, run: PaperRun) -> _Predicted:
    paper = experiment.table.paper
    config = experiment.paper_config(name)
    cluster, engine = load_cluster(run.machine or paper.machine), run.engine or paper.engine or OWN
    try:
        step = predict_step(config, cluster, engine=engine)
        memory = device_memory(with_dropout(config, paper.dropout), cluster, engine).total
    except InputError as error:
        raise InputError(f"experiment {experiment.entry.id}, published run {name}: {error}") from None
    return _Predicted(config, cluster, step, memory, run, paper.gb_bytes)


def _figures(name: str, run: PaperRun, predicted: _Predicted, first: _Predicted) -> Iterator[PublishedFigure]:
    config = predicted.config
    layout = f"{layout_text(config, first.config)}, {config.parallel.num_ranks:,} x {predicted.cluster.name}"
    shown: Mapping[str, float | None] = run.published or _SHOWN
    if config.parallel.pipeline_parallel_size > 1 and not run.published:
        shown = {**shown, "bubble_percent": None}
    for figure, published in shown.items():
        if figure == OUT_OF_MEMORY:
            value, low, high = _memory(predicted)
            yield PublishedFigure(name, layout, "memory, GB (published: out of memory)", value, low, high, None)
        elif figure in (SPEED_UP, EFFICIENCY):
            yield _relative(name, layout, figure, predicted, first, published)
        else:
            title, compute = FIGURES[figure]
            yield PublishedFigure(name, layout, title, *compute(predicted), published)


def _relative(
    name: str, layout: str, figure: str, predicted: _Predicted, first: _Predicted, published: float | None
) -> PublishedFigure:
    """Compare the speed of a run with the first run: both have the same bias, so no error bar is known."""
    if figure == SPEED_UP:
        value, title = first.step.seconds / predicted.step.seconds, "speed-up over the first run"
    else:
        value, title = 100 * _tflops(predicted)[0] / _tflops(first)[0], "speed of a GPU, % of the first run"
    return PublishedFigure(name, layout, title, value, None, None, published)


def layout_text(config: TrainConfig, first: TrainConfig | None = None) -> str:
    """Return the layout in words, with microbatches x sequences: "tp=2 sp dp=4 ZeRO-1, 4 x 2".

    Args:
        config: the run.
        first: the first run of the experiment; sizes of the model that differ from its sizes are named, too.
    """
    parallel, training = config.parallel, config.training
    dp = parallel.data_parallel_size or 1
    sizes = {
        "tp": parallel.tensor_parallel_size,
        "pp": parallel.pipeline_parallel_size,
        "v": parallel.stages_per_rank or 1,
        "cp": parallel.context_parallel_size,
        "dp": dp,
        "ep": parallel.expert_parallel_size,
        "etp": parallel.expert_tensor_parallel_size,
    }
    words = [f"{axis}={size}" for axis, size in sizes.items() if size > 1]
    words += ["sp"] if parallel.sequence_parallel else []
    words += [parallel.context_parallel_method] if parallel.context_parallel_size > 1 else []
    words += [f"ZeRO-{parallel.zero_stage}"] if parallel.zero_stage is not None and dp > 1 else []
    words += [parallel.schedule] if parallel.schedule else []
    words += [f"recompute {config.model.recompute}"] if config.model.recompute != "none" else []
    microbatches = training.global_batch_size // training.microbatch_size // dp
    texts = [" ".join(words) or "one rank", f"{microbatches} x {training.microbatch_size}"]
    named = {"num_layers": "layers", "hidden_size": "wide", "seq_len": "tokens", "num_experts": "experts"}
    for name, word in named.items():
        if first is not None and getattr(config.model, name) != getattr(first.model, name):
            texts.append(f"{getattr(config.model, name):,} {word}")
    return ", ".join(texts)


def case_text(config: TrainConfig, first: TrainConfig, case: Case) -> str:
    """Return the layout of a run on this machine in words, and what stands in for its computing or its network."""
    text = layout_text(config, first)
    if case.forward_ms is not None and case.backward_ms is not None:
        text += f", sleeping {case.forward_ms:g} + {case.backward_ms:g} ms"
    return text if case.link_mbit_per_s is None else f"{text}, cable of {case.link_mbit_per_s:g} Mbit/s"
