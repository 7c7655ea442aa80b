"""Formulas for the bytes that a rank sends in a step."""

from collections import Counter

from fused_megatron.assembly.build import DTYPES
from fused_megatron.assembly.microbatches import most_positions
from fused_megatron.config import TrainConfig
from fused_megatron.models import StageSpan


def stage_communication(config: TrainConfig, span: StageSpan) -> dict[str, int]:
    """Compute the bytes of a stage's tensor-parallel collectives, forward and backward of one microbatch, by kind.

    Bytes count whole tensors, as record_communication does. A ring sends (R - 1) / R of them, and twice as many for an
    all-reduce. A is the bytes of an activation [S, B, H]; with context parallelism S is the number of positions of the
    rank that holds most. k is 1 with recompute="full", where backward repeats the forward of a block, and otherwise 0.
    A block sends

        all_reduce      (4 + 2 k) A                         Shoeybi et al. 2019 (arXiv:1909.08053), section 3
      instead with sequence parallelism
        reduce_scatter  (4 + 2 k) A                         Korthikanti et al. 2022 (arXiv:2205.05198), section 4.2.2
        all_gather      (6 + 2 k) A                         two of them gather an operand again for backward
        all_reduce      4 bytes an element of norms and of biases that every rank holds
      and in both cases, with G key-value heads of size D
        all_reduce      8 G D (H + 1) if G is less than R (8 G D H without biases); 8 D with query_key_norm

    The first and the last stage also send an all-reduce of A each; with sequence parallelism, a reduce-scatter and an
    all-gather of A instead. The first stage then all-gathers the gradient of learned positions. The last stage gathers
    12 bytes a token and rank for the loss.

    Args:
        config: the config of the whole run.
        span: the blocks of the stage.
    """
    model, parallel = config.model, config.parallel
    ranks, rows = parallel.tensor_parallel_size, most_positions(config)
    tokens = config.training.microbatch_size * rows
    if ranks == 1:
        return {}
    size = DTYPES[config.training.dtype].itemsize
    activation = size * tokens * model.hidden_size
    blocks, ends = span.stop - span.start, span.first + span.last
    again = 2 if model.recompute == "full" else 0
    # Gradients of parameters that several ranks hold, while each rank uses them for different heads.
    qkv_bias = model.linear_biases if model.qkv_bias is None else model.qkv_bias
    copied = 2 * model.kv_heads * model.head_size * (model.hidden_size + qkv_bias) * (model.kv_heads < ranks)
    copied += 2 * model.head_size * model.query_key_norm
    sent = Counter(all_gather=12 * tokens * ranks * span.last, all_reduce=blocks * 4 * copied)
    if not parallel.sequence_parallel:
        sent["all_reduce"] += (blocks * (4 + again) + ends) * activation
    else:
        sent["reduce_scatter"] = (blocks * (4 + again) + ends) * activation
        sent["all_gather"] += (blocks * (6 + again) + ends) * activation
        if span.first and model.position == "learned":
            sent["all_gather"] += size * rows * model.hidden_size
        norm = model.hidden_size * (1 if model.normalization == "rms_norm" else 2)
        biases = 2 * model.hidden_size * model.linear_biases
        sent["all_reduce"] += 4 * (blocks * (2 * norm + biases) + norm * span.last)
    return {kind: num_bytes for kind, num_bytes in sent.items() if num_bytes}


def message_bytes(config: TrainConfig) -> int:
    """Compute the bytes of a message between two stages for a microbatch: [S, B, H] or its sequence shard.

    The activation and its gradient have the same size. With context parallelism S is the number of positions of the
    rank that holds most.
    """
    model, parallel = config.model, config.parallel
    rows = most_positions(config) // (parallel.tensor_parallel_size if parallel.sequence_parallel else 1)
    return DTYPES[config.training.dtype].itemsize * rows * config.training.microbatch_size * model.hidden_size
