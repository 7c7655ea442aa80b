"""A config made small: the same structure and axes, for at most eight ranks and seconds of time."""

import math
from dataclasses import replace
from typing import Any

from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.config import OptimizerConfig, ParallelConfig, TrainConfig, TransformerConfig
from fused_megatron.planning.verify.layout_parts import AXES

MOST_RANKS = 8
MOST_AXES = 3
SEQ_LEN = 20  # of 2 samples a microbatch it makes 40 rows, and 20 on each of two ranks: three chunks do not divide them
MICROBATCH_SIZE = 2
CHUNKS = 3
"""Of an overlapped product: on a CPU the cost model finds one chunk best, which would leave the chunks untried."""
BUCKET_MB = 0.02  # several buckets for each stage

# Weights whose products are of order 1: with the 0.02 of a wide model attention would be uniform in a narrow one, and
# the gradients of queries and keys nearly 0.
INIT_STD = 0.15
# Small beside gradients (of order 1e-3 and more once they are clipped), large beside their rounding: without it AdamW
# turns the sign of a rounding error into an update of the full learning rate.
EPS = 1e-4
# Every step is clipped: the norm of a reduced model's gradients is above it.
CLIP_NORM = 0.1
# Updates are seen beside the rounding of the weights, and three of them keep the model near where it was.
LEAST_LR, MOST_LR = 1e-3, 1e-2
_UNEVEN_VOCABULARY, _EVEN_VOCABULARY = 61, 64
_PADDED_TO = 8


def axes_in_use(config: TrainConfig) -> tuple[str, ...]:
    """The axes of the mesh that are longer than 1, by name.

    data_parallel_size=None is what is left of the world: in use where the batch divides over two replicas.
    """
    parallel, training = config.parallel, config.training
    num_microbatches = training.global_batch_size // training.microbatch_size
    replicas = parallel.data_parallel_size or (2 if num_microbatches % 2 == 0 else 1)
    pipeline = max(parallel.pipeline_parallel_size, plan_pipeline(config).num_stages)
    sizes = {"tp": parallel.tensor_parallel_size, "pp": pipeline, "dp": replicas}
    return tuple(axis for axis in AXES if sizes[axis] > 1)


def reduce_config(config: TrainConfig, axes: tuple[str, ...], dtype: str = "float32") -> TrainConfig:
    """A small config of the same structure.

    Kept: forms of the model (family, activation, norms, positions, biases, tied embedding, dropout, window), ratios of
    heads, key-value heads and width, whether the vocabulary is padded, whether all stages hold as many blocks,
    recomputation, schedule, stages a rank, sequence parallelism, weight decay, and whether gradients are clipped.

    Args:
        config: any that `fused-megatron train` takes.
        axes: those to keep longer than 1, three at most.
        dtype: of weights and activations.

    Raises:
        InputError: as plan_pipeline; a batch that does not split over data_parallel_size.
    """
    if config.parallel.data_parallel_size is not None:
        config.check_data_parallel(config.parallel.data_parallel_size)
    config.model.check_trainable()
    sizes = _axis_sizes(config, axes)
    parallel = _reduced_parallel(config, sizes)
    stages = sizes["pp"] * (parallel.stages_per_rank or 1)
    model = _reduced_model(config, sizes["tp"], "tp" in axes, stages, parallel.pipeline_cut)
    # More microbatches than pipeline ranks: so a pipeline has a steady state, too.
    num_microbatches = max(2, sizes["pp"] + 1)
    size = min(MICROBATCH_SIZE, config.training.microbatch_size)
    training = replace(
        config.training,
        dtype=dtype,
        microbatch_size=size,
        global_batch_size=size * num_microbatches * sizes["dp"],
        bucket_mb=BUCKET_MB,
        run_folder=None,
    )
    return replace(config, model=model, parallel=parallel, optimizer=_reduced_optimizer(config), training=training)


def _axis_sizes(config: TrainConfig, axes: tuple[str, ...]) -> dict[str, int]:
    """Two ranks an axis; more where the structure asks for it and the ranks suffice."""
    parallel, kv_heads = config.parallel, config.model.kv_heads
    sizes = {axis: 2 if axis in axes else 1 for axis in AXES}
    if "pp" in axes and parallel.pipeline_parallel_size == 1:
        sizes["pp"] = 1  # several stages on one rank
    spare = MOST_RANKS // math.prod(sizes.values())
    if "dp" in axes and (parallel.zero_shard_size or 1) > 1 and spare >= 2:
        sizes["dp"] = 4  # two replicas share, and two repeat it
    elif "tp" in axes and 1 < kv_heads < parallel.tensor_parallel_size and spare >= 2:
        sizes["tp"] = 4  # some ranks, not all, hold the same key-value head
    elif sizes["pp"] == 2 and parallel.pipeline_parallel_size > 2 and spare >= 2:
        sizes["pp"] = 3  # a rank with neither embedding nor head
    return sizes


def _reduced_parallel(config: TrainConfig, sizes: dict[str, int]) -> ParallelConfig:
    parallel, plan = config.parallel, plan_pipeline(config)
    per_rank = min(3, plan.num_stages // parallel.pipeline_parallel_size)
    pipeline: dict[str, Any] = {"schedule": None, "stages_per_rank": None, "pipeline_cut": None}
    if sizes["pp"] > 1 or (parallel.pipeline_parallel_size == 1 and plan.num_stages > 1):
        pipeline = {"schedule": plan.name, "stages_per_rank": per_rank, "pipeline_cut": None}
        if parallel.pipeline_cut is not None:
            pipeline["pipeline_cut"] = _reduced_cut(parallel.pipeline_cut, sizes["pp"] * per_rank)
    return replace(
        parallel,
        tensor_parallel_size=sizes["tp"],
        pipeline_parallel_size=sizes["pp"],
        data_parallel_size=sizes["dp"],
        zero_shard_size=None if parallel.zero_shard_size is None else min(parallel.zero_shard_size, 2, sizes["dp"]),
        sequence_parallel=parallel.sequence_parallel and sizes["tp"] > 1,
        overlap=CHUNKS if parallel.overlap is True else parallel.overlap,
        timeout_s=min(parallel.timeout_s, 60.0),
        **pipeline,
    )


def _reduced_cut(cut: tuple[int, ...], num_stages: int) -> tuple[int, ...]:
    """Two blocks a stage at most; the first and the last stage are the first and the last of the whole cut."""
    kept = [*cut[: num_stages - 1], cut[-1]]
    return tuple(min(blocks, 2) for blocks in kept)


def _reduced_model(
    config: TrainConfig, tp_size: int, keeps_tp: bool, num_stages: int, cut: tuple[int, ...] | None
) -> TransformerConfig:
    model = config.model
    heads, kv_heads = _reduced_heads(model, config.parallel.tensor_parallel_size if keeps_tp else 1, tp_size)
    head_size = 8 if model.rotary_fraction >= 0.5 else 16  # at least two pairs are rotated
    hidden_size = heads * head_size
    if model.head_dim is not None:
        hidden_size = max(8, round(hidden_size * model.hidden_size / (model.num_heads * model.head_dim) / 8) * 8)
    ffn = None
    if model.ffn_hidden_size is not None:
        ffn = max(1, round(hidden_size * model.ffn_hidden_size / model.hidden_size / tp_size)) * tp_size
    seq_len = min(model.seq_len, SEQ_LEN)
    window, original = model.sliding_window, model.rotary_original_seq_len
    return replace(
        model,
        num_layers=_reduced_layers(config, num_stages, cut),
        hidden_size=hidden_size,
        num_heads=heads,
        num_kv_heads=None if model.num_kv_heads is None else kv_heads,
        head_dim=None if model.head_dim is None else head_size,
        ffn_hidden_size=ffn,
        seq_len=seq_len,
        sliding_window=None if window is None else max(2, min(seq_len, seq_len * window // model.seq_len)),
        rotary_original_seq_len=None if original is None else max(2, seq_len * original // model.seq_len),
        init_std=INIT_STD,
        **_reduced_vocabulary(config),
    )


def _reduced_heads(model: TransformerConfig, full_tp_size: int, tp_size: int) -> tuple[int, int]:
    """Heads and key-value heads; a rank has one or more of these, or shares one, as in the full config."""
    groups, ratio = model.kv_heads, min(4, model.num_heads // model.kv_heads)
    if groups % full_tp_size == 0:
        kv_heads = tp_size * min(2, groups // full_tp_size)
    else:
        kv_heads = tp_size // 2
    while kv_heads * ratio % tp_size:
        ratio += 1
    return kv_heads * ratio, kv_heads


def _reduced_layers(config: TrainConfig, num_stages: int, cut: tuple[int, ...] | None) -> int:
    """A block for each stage, two at least; one more where the stages hold different numbers of them."""
    if cut is not None:
        return sum(cut)
    full_stages = plan_pipeline(config).num_stages
    if num_stages > 1 and config.model.num_layers < full_stages:
        return num_stages - 1  # the last has the head only
    uneven = num_stages > 1 and config.model.num_layers % full_stages > 0
    return max(2, num_stages + uneven)


def _reduced_vocabulary(config: TrainConfig) -> dict[str, Any]:
    """Padded where the full one is; one that is not known yet (the tokenizer's) is taken to be."""
    model = config.model
    multiple = math.lcm(model.pad_vocab_size_to_multiple_of, config.parallel.tensor_parallel_size)
    even = model.vocab_size is not None and model.vocab_size % multiple == 0
    return {
        "vocab_size": _EVEN_VOCABULARY if even else _UNEVEN_VOCABULARY,
        "pad_vocab_size_to_multiple_of": min(_PADDED_TO, model.pad_vocab_size_to_multiple_of),
    }


def _reduced_optimizer(config: TrainConfig) -> OptimizerConfig:
    optimizer = config.optimizer
    lr = min(max(optimizer.lr, LEAST_LR), MOST_LR)
    clip = min(optimizer.clip_norm, CLIP_NORM)
    kind = optimizer.kind
    if kind == "lion":  # it makes a full update of a gradient of nothing but rounding, whose sign the layout decides
        kind = "adamw"
    eps = optimizer.eps if kind == "sgd" else EPS
    return replace(optimizer, kind=kind, lr=lr, min_lr=min(optimizer.min_lr, lr), eps=eps, clip_norm=clip)
