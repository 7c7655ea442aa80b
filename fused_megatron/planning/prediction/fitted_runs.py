"""Error bars of predictions, from the runs to which a cluster's constants were fitted."""

from fused_megatron.config import TrainConfig
from fused_megatron.planning.prediction.cluster import Cluster

_UNFITTED_ERROR = 0.3
"""Error of constants from data sheets: the efficiency of large products lies between 45 and 85 % of a peak."""
_OUTSIDE = 0.5
"""Growth of the error bar with each respect in which a run lies outside."""


def outside_of_fit(config: TrainConfig, cluster: Cluster, engine: str) -> tuple[str, ...]:
    """Return in which respects a run lies outside of the runs to which the constants were fitted, one text each."""
    if cluster.fitted is None:
        return (f"the constants of {cluster.name} come from data sheets: no run was fitted",)
    found = []
    if engine not in cluster.fitted.engines:
        found.append(f"engine {engine}: the fitted runs are of {', '.join(cluster.fitted.engines)}")
    for name, value in values_of(config).items():
        low, high = cluster.fitted.ranges.get(name, (1, 1))
        if not low <= value <= high:
            found.append(f"{name}={value:,}: the fitted runs have {low:,.0f} to {high:,.0f}")
    return tuple(found)


def error_share(cluster: Cluster, num_outside: int) -> float:
    """Return the error bar as a share of the predicted time."""
    if cluster.fitted is None:
        return _UNFITTED_ERROR
    return cluster.fitted.error_percent / 100 * (1 + _OUTSIDE * num_outside)


def values_of(config: TrainConfig) -> dict[str, int]:
    """Return the sizes of a run that ranges name."""
    model, parallel = config.model, config.parallel
    return {
        "gpus": parallel.num_ranks,
        "hidden_size": model.hidden_size,
        "seq_len": model.seq_len,
        "microbatch_tokens": config.training.microbatch_size * model.seq_len // parallel.context_parallel_size,
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_parallel_size": parallel.expert_parallel_size,
    }
