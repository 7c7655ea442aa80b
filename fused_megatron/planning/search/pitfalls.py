"""Warnings of common mistakes in a layout, for plans and for configs of users."""

from collections.abc import Iterator
from math import ceil

from fused_megatron.assembly.pipeline_plan import plan_pipeline, stage_spans
from fused_megatron.config import TrainConfig
from fused_megatron.data_parallel.fixed_sizes import BYTES_PER_ELEMENT
from fused_megatron.models.stage_cut import block_cost
from fused_megatron.planning.parameter_counts import attention_features, expansion_features
from fused_megatron.planning.prediction.cluster import Cluster
from fused_megatron.planning.prediction.end_of_step import replica_ring

_MOST_UNBALANCED = 1.2
"""Work of the busiest pipeline rank over the mean."""
_MOST_BUBBLE = 0.1
"""Share of a step that ranks of a pipeline wait."""
_LEAST_FEATURES = 512
"""Outputs of a product on a tensor-parallel rank: smaller products leave a GPU idle."""


def pitfalls(config: TrainConfig, cluster: Cluster) -> list[str]:
    """Return warnings of a layout on a cluster, one line each.

    Tensor parallelism across nodes or on a small model, pipeline ranks with unequal work, too few microbatches for a
    pipeline, weights gathered over a slow network (ZeRO stage 3).

    Args:
        config: model.vocab_size must be given; parallel.data_parallel_size=None counts as 1.
        cluster: the machine.

    Raises:
        InputError: as plan_pipeline and stage_spans.
    """
    return [*_tensor_parallel(config, cluster), *_pipeline(config), *_gathered_weights(config, cluster)]


def _tensor_parallel(config: TrainConfig, cluster: Cluster) -> Iterator[str]:
    model, tp, node = config.model, config.parallel.tensor_parallel_size, cluster.gpus_per_node
    if tp == 1:
        return
    if tp > node:
        yield (
            f"tp={tp} spans nodes of {node} GPUs: every block sends its activations over the network "
            f"({cluster.network_gb_per_s:g} GB/s a GPU, {cluster.node_gb_per_s:g} GB/s inside a node)"
        )
    features = attention_features(model, tp)[1]
    if len(model.expert_blocks) < model.num_layers:
        features = min(features, expansion_features(model, model.ffn_size, tp))
    if features < _LEAST_FEATURES and cluster.device == "cuda":
        yield (
            f"tp={tp} on a small model: a product of a rank has {features} features, too few to keep a GPU busy "
            f"(smaller tensor_parallel_size)"
        )


def _pipeline(config: TrainConfig) -> Iterator[str]:
    parallel, training = config.parallel, config.training
    ranks = parallel.pipeline_parallel_size
    if ranks == 1:
        return
    plan = plan_pipeline(config)
    spans = stage_spans(config, plan)
    block, work = block_cost(config.model), [0.0] * ranks
    for span, rank in zip(spans, plan.placement, strict=True):
        work[rank] += block * (span.stop - span.start)
        work[rank] += config.model.hidden_size * (config.model.vocab_size or 0) * span.last
    unbalanced = max(work) * ranks / sum(work)
    if unbalanced > _MOST_UNBALANCED:
        number = max(span.stop - span.start for span in spans)
        yield (
            f"unbalanced stages: the busiest of {ranks} pipeline ranks does {unbalanced:.2f} times the mean work "
            f"({config.model.num_layers} blocks in {plan.num_stages} stages of at most {number}, and the head)"
        )
    number = training.global_batch_size // training.microbatch_size // (parallel.data_parallel_size or 1)
    per_rank = plan.num_stages // ranks
    idle = (ranks - 1) / (per_rank if plan.name.startswith("interleaved") else 1)
    if plan.name.startswith(("zb", "v_half", "dual")) or plan.name == "interleaved_zero_bubble":
        idle /= 3  # F, I and W of about the same time, and W fills the bubble at the end
    share = idle / (number + idle)
    if share > _MOST_BUBBLE:
        wanted = ceil(idle * (1 - _MOST_BUBBLE) / _MOST_BUBBLE)
        yield (
            f"too few microbatches: {number:,} for {ranks} pipeline ranks leave a bubble of about {share:.0%} of the "
            f"step ({wanted:,} microbatches: {_MOST_BUBBLE:.0%})"
        )


def _gathered_weights(config: TrainConfig, cluster: Cluster) -> Iterator[str]:
    """Warn if what ZeRO stage 3 sends for a block takes longer than the block's products, in a microbatch.

    It gathers the weights twice and reduces float32 gradients once; the products are of forward and backward.
    """
    parallel, model, training = config.parallel, config.model, config.training
    ring = replica_ring(cluster, parallel)
    if parallel.zero_stage != 3 or parallel.zero_gather != "block" or not ring.leaves_node:
        return
    tokens = training.microbatch_size * config.most_positions
    weights = block_cost(model) / parallel.tensor_parallel_size  # about: attention counts as weights
    sent_s = ring.gather_s((2 * training.element_bytes + BYTES_PER_ELEMENT) * weights)
    products_s = 6 * tokens * weights / (1e12 * cluster.peak_tflops * cluster.product_efficiency)
    if sent_s > products_s:
        yield (
            f"ZeRO-3 over a slow network: sending a block's weights and gradients takes {sent_s / products_s:.1f} "
            f"times its products for {tokens:,} tokens (larger microbatch_size, or zero_stage=1)"
        )
