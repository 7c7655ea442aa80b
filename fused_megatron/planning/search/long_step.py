"""Prediction of a step with many microbatches from two steps with fewer: in between, every round takes the same time."""

from dataclasses import dataclass, replace

from fused_megatron.config import TrainConfig
from fused_megatron.planning.prediction.cluster import Cluster
from fused_megatron.planning.prediction.step_time import predict_step

_ROUNDS = 3
"""Rounds of one microbatch for each pipeline rank after which a schedule repeats itself."""


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of a step, as in StepPrediction.

    Attributes:
        seconds, low_s, high_s: of the step, and its error bar.
        parts: seconds by part; they add up to seconds.
        outside: in which respects the run lies outside of the data of the prediction.
    """

    seconds: float
    low_s: float
    high_s: float
    parts: dict[str, float]
    outside: tuple[str, ...]


def predict_long_step(config: TrainConfig, cluster: Cluster) -> StepTime:
    """Predict a step, by simulation of at most _ROUNDS + 2 rounds of microbatches.

    A longer step takes the time of a shorter one and, for each further round, what one more round adds to it.
    """
    training, parallel = config.training, config.parallel
    ranks, replicas = parallel.pipeline_parallel_size, parallel.data_parallel_size or 1
    number = training.global_batch_size // training.microbatch_size // replicas
    few = _ROUNDS * ranks + number % ranks
    if number <= few + 2 * ranks:
        return _predict(config, cluster, number)
    short, longer = (_predict(config, cluster, each) for each in (few, few + ranks))
    rounds = (number - few) // ranks
    parts = {name: _line(short.parts[name], longer.parts[name], rounds) for name in short.parts}
    low, high = (_line(getattr(short, name), getattr(longer, name), rounds) for name in ("low_s", "high_s"))
    return StepTime(_line(short.seconds, longer.seconds, rounds), low, high, parts, longer.outside)


def _predict(config: TrainConfig, cluster: Cluster, num_microbatches: int) -> StepTime:
    training = config.training
    batch = num_microbatches * training.microbatch_size * (config.parallel.data_parallel_size or 1)
    found = predict_step(replace(config, training=replace(training, global_batch_size=batch)), cluster)
    return StepTime(found.seconds, found.low_s, found.high_s, found.parts, found.outside)


def _line(first: float, second: float, rounds: int) -> float:
    return first + rounds * (second - first)
