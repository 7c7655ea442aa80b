"""Bytes that a rank sends in a step, by formula: before anything is built."""

from collections import Counter

from fused_megatron.config import TrainConfig
from fused_megatron.models import StageSpan

_SIZES = {"float32": 4, "bfloat16": 2}


def stage_communication(config: TrainConfig, span: StageSpan) -> dict[str, int]:
    """Bytes of the tensor-parallel collectives of a stage, forward and backward of one microbatch.

    As record_communication counts them: by kind, and of whole tensors (a ring sends (R - 1) / R of that, an all-reduce
    twice as much). With A the bytes of an activation [S, B, H], and k = 1 where blocks run forward once more
    (recompute "full"), else 0, a block sends

        all_reduce      (4 + 2 k) A                         Shoeybi et al. 2019 (arXiv:1909.08053), section 3
      with sequence parallelism
        reduce_scatter  (4 + 2 k) A                         Korthikanti et al. 2022 (arXiv:2205.05198), section 4.2.2
        all_gather      (6 + 2 k) A                         two of them make a gathered operand again
        all_reduce      4 bytes an element of norms and of biases that every rank holds
      and in any case, with G key-value heads of D
        all_reduce      8 G D (H + 1) with fewer of them than ranks (without biases H); 8 D with query_key_norm

    and the ends of the model: an all-reduce of A each (a reduce-scatter and an all-gather), with sequence parallelism
    the gradient of learned positions and what the head multiplies, and 12 bytes a token and rank for the loss.

    Args:
        config: of the whole run.
        span: what the stage holds.
    """
    model, parallel = config.model, config.parallel
    ranks, tokens = parallel.tensor_parallel_size, config.training.microbatch_size * model.seq_len
    if ranks == 1:
        return {}
    size = _SIZES[config.training.dtype]
    activation = size * tokens * model.hidden_size
    blocks, ends = span.stop - span.start, span.first + span.last
    again = 2 if model.recompute == "full" else 0
    # Gradients of parameters that several ranks hold for heads of their own.
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
            sent["all_gather"] += size * model.seq_len * model.hidden_size
        norm = model.hidden_size * (1 if model.normalization == "rms_norm" else 2)
        biases = 2 * model.hidden_size * model.linear_biases
        sent["all_reduce"] += 4 * (blocks * (2 * norm + biases) + norm * span.last)
    return {kind: num_bytes for kind, num_bytes in sent.items() if num_bytes}


def message_bytes(config: TrainConfig) -> int:
    """Of what a stage hands on for a microbatch, and of the gradient that comes back: [S, B, H], or a block of S."""
    model, parallel = config.model, config.parallel
    rows = model.seq_len // (parallel.tensor_parallel_size if parallel.sequence_parallel else 1)
    return _SIZES[config.training.dtype] * rows * config.training.microbatch_size * model.hidden_size
