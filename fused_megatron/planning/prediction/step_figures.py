"""Figures that follow from the time of a step: tokens/s, MFU, and days and cost of a training."""

from fused_megatron.config import TrainConfig
from fused_megatron.observe.model_flops import gpt_step_flops
from fused_megatron.planning.prediction.cluster import Cluster
from fused_megatron.planning.prediction.step_time import StepPrediction


def step_figures(
    config: TrainConfig,
    cluster: Cluster,
    prediction: StepPrediction,
    tokens: int | None = None,
    price: float | None = None,
) -> dict[str, float | None]:
    """Return step_s, low_s, high_s, tokens_per_s and mfu, and of the training days, gpu_hours and cost.

    Args:
        config: the run.
        cluster: the machine.
        prediction: of its step.
        tokens: of the whole training; None: the last three are None.
        price: of a GPU hour; None: cost is None.
    """
    gpus, batch = config.parallel.num_ranks, config.training.global_batch_size * config.model.seq_len
    model_flops, _ = gpt_step_flops(config.model, batch)
    seconds = prediction.seconds
    days = None if tokens is None else seconds * tokens / batch / 86400
    gpu_hours = None if days is None else 24 * days * gpus
    return {
        "step_s": seconds,
        "low_s": prediction.low_s,
        "high_s": prediction.high_s,
        "tokens_per_s": batch / seconds,
        "mfu": model_flops / seconds / (1e12 * cluster.peak_tflops * gpus),
        "days": days,
        "gpu_hours": gpu_hours,
        "cost": None if gpu_hours is None or price is None else gpu_hours * price,
    }
