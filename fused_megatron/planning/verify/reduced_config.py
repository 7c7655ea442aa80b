"""Reduction of a config to a small one with the same structure and axes, for at most eight ranks and a few seconds."""

import math
from dataclasses import replace
from typing import Any

from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.config import OptimizerConfig, ParallelConfig, TrainConfig, TransformerConfig
from fused_megatron.planning.verify.layout_parts import AXES

MOST_RANKS = 8
MOST_AXES = 3
SEQ_LEN = 20  # with 2 samples a microbatch 40 rows, and 20 on each of two ranks: three chunks do not divide them
MICROBATCH_SIZE = 2
MOST_EXPERTS = 8
CHUNKS = 3
"""Chunks of an overlapped product: on a CPU the cost model takes one chunk, so chunked code would not run."""
BUCKET_MB = 0.02  # several buckets for each stage

# Makes the products of a narrow model's weights about 1. The 0.02 of a wide model would make attention uniform, and the
# gradients of queries and keys nearly 0.
INIT_STD = 0.15
# Small beside gradients (1e-3 and more after clipping), large beside their rounding errors. With a smaller eps AdamW
# turns the sign of a rounding error into an update of the full learning rate.
EPS = 1e-4
# The gradient norm of a reduced model is larger, so every step clips.
CLIP_NORM = 0.1
# Large enough that updates exceed the rounding of weights; small enough that three updates change the model little.
LEAST_LR, MOST_LR = 1e-3, 1e-2
_UNEVEN_VOCABULARY, _EVEN_VOCABULARY = 61, 64
_PADDED_TO = 8


def axes_in_use(config: TrainConfig) -> tuple[str, ...]:
    """Return the names of the mesh axes that are longer than 1.

    With data_parallel_size=None the number of ranks decides it; "dp" counts as in use if two replicas divide the batch.
    """
    parallel, training = config.parallel, config.training
    num_microbatches = training.global_batch_size // training.microbatch_size
    replicas = parallel.data_parallel_size or (2 if num_microbatches % 2 == 0 else 1)
    pipeline = max(parallel.pipeline_parallel_size, plan_pipeline(config).num_stages)
    sizes = {
        "tp": parallel.tensor_parallel_size,
        "pp": pipeline,
        "cp": parallel.context_parallel_size,
        "dp": replicas,
    }
    return tuple(axis for axis in AXES if sizes[axis] > 1)


def reduce_config(config: TrainConfig, axes: tuple[str, ...], dtype: str = "float32") -> TrainConfig:
    """Return a small config of the same structure.

    It keeps the forms of the model (family, activation, norms, positions, biases, tied embedding, dropout, window), the
    ratios of heads, key-value heads and width, whether the vocabulary is padded, whether all stages hold the same
    number of blocks, recomputation, schedule, stages a rank, sequence parallelism, the method of context parallelism,
    weight decay, and whether gradients are clipped.

    Args:
        config: any config of `fused-megatron train`.
        axes: axes to keep longer than 1, three at most.
        dtype: dtype of weights and activations.

    Raises:
        InputError: as plan_pipeline; a batch that does not split over data_parallel_size.
    """
    if config.parallel.data_parallel_size is not None:
        config.check_data_parallel(config.parallel.data_parallel_size)
    config.model.check_trainable()
    sizes = _axis_sizes(config, axes)
    parallel = _reduced_parallel(config, sizes)
    stages = sizes["pp"] * (parallel.stages_per_rank or 1)
    model = _reduced_model(config, parallel, "tp" in axes, stages)
    # More microbatches than pipeline ranks, so that the pipeline also reaches a steady state.
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
    """Return the size of each axis: 2, or more if the structure needs it and MOST_RANKS allows it."""
    parallel, kv_heads = config.parallel, config.model.kv_heads
    sizes = {axis: 2 if axis in axes else 1 for axis in AXES}
    if "pp" in axes and parallel.pipeline_parallel_size == 1:
        sizes["pp"] = 1  # several stages on one rank
    spare = MOST_RANKS // math.prod(sizes.values())
    if "dp" in axes and (parallel.zero_shard_size or 1) > 1 and sizes["cp"] == 1 and spare >= 2:
        sizes["dp"] = 4  # two replicas share the state, and two others repeat it
    elif "tp" in axes and 1 < kv_heads < parallel.tensor_parallel_size and spare >= 2:
        sizes["tp"] = 4  # some ranks, not all, hold the same key-value head
    elif sizes["cp"] == 2 and parallel.context_parallel_size > 2 and spare >= 2:
        sizes["cp"] = 4  # keys and values of more than one other rank
    elif sizes["pp"] == 2 and parallel.pipeline_parallel_size > 2 and spare >= 2:
        sizes["pp"] = 3  # a rank with neither embedding nor head
    return sizes


def _reduced_parallel(config: TrainConfig, sizes: dict[str, int]) -> ParallelConfig:
    parallel, plan, replicas = config.parallel, plan_pipeline(config), sizes["cp"] * sizes["dp"]
    per_rank = min(3, plan.num_stages // parallel.pipeline_parallel_size)
    pipeline: dict[str, Any] = {"schedule": None, "stages_per_rank": None, "pipeline_cut": None}
    if sizes["pp"] > 1 or (parallel.pipeline_parallel_size == 1 and plan.num_stages > 1):
        pipeline = {"schedule": plan.name, "stages_per_rank": per_rank, "pipeline_cut": None}
        if parallel.pipeline_cut is not None:
            pipeline["pipeline_cut"] = _reduced_cut(parallel.pipeline_cut, sizes["pp"] * per_rank)
    stage_ranks = sizes["tp"] * replicas
    expert_size = math.gcd(2, parallel.expert_parallel_size, stage_ranks) if parallel.expert_parallel_size > 1 else 1
    return replace(
        parallel,
        expert_parallel_size=expert_size,
        expert_tensor_parallel_size=math.gcd(2, parallel.expert_tensor_parallel_size, stage_ranks // expert_size),
        tensor_parallel_size=sizes["tp"],
        pipeline_parallel_size=sizes["pp"],
        context_parallel_size=sizes["cp"],
        data_parallel_size=sizes["dp"],
        zero_shard_size=None if parallel.zero_shard_size is None else min(parallel.zero_shard_size, 2, replicas),
        sequence_parallel=parallel.sequence_parallel and sizes["tp"] > 1,
        overlap=CHUNKS if parallel.overlap is True else parallel.overlap,
        timeout_s=min(parallel.timeout_s, 60.0),
        **pipeline,
    )


def _reduced_cut(cut: tuple[int, ...], num_stages: int) -> tuple[int, ...]:
    """Return a cut with at most two blocks a stage, from the first stages and the last stage of the full cut."""
    kept = [*cut[: num_stages - 1], cut[-1]]
    return tuple(min(blocks, 2) for blocks in kept)


def _reduced_model(config: TrainConfig, parallel: ParallelConfig, keeps_tp: bool, num_stages: int) -> TransformerConfig:
    """Return the model for the reduced layout."""
    model, tp_size = config.model, parallel.tensor_parallel_size
    multiple = tp_size * (parallel.context_parallel_size if "all_to_all" in parallel.context_parallel_method else 1)
    heads, kv_heads = _reduced_heads(model, config.parallel.tensor_parallel_size if keeps_tp else 1, tp_size, multiple)
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
        num_layers=_reduced_layers(config, num_stages, parallel.pipeline_cut),
        hidden_size=hidden_size,
        num_heads=heads,
        num_kv_heads=None if model.num_kv_heads is None else kv_heads,
        head_dim=None if model.head_dim is None else head_size,
        ffn_hidden_size=ffn,
        seq_len=seq_len,
        sliding_window=None if window is None else max(2, min(seq_len, seq_len * window // model.seq_len)),
        rotary_original_seq_len=None if original is None else max(2, seq_len * original // model.seq_len),
        init_std=INIT_STD,
        recompute_blocks=None if model.recompute_blocks is None else 1,
        **_reduced_vocabulary(config),
        **({} if model.num_experts is None else _reduced_experts(model, parallel, hidden_size)),
    )


def _reduced_experts(model: TransformerConfig, parallel: ParallelConfig, hidden_size: int) -> dict[str, Any]:
    """Return the fields of at most eight experts; a token selects some of them, in some of their groups."""
    assert model.num_experts is not None
    sizes = {"expert_ffn_hidden_size": parallel.expert_tensor_parallel_size}
    sizes["shared_expert_ffn_size"] = parallel.tensor_parallel_size
    fields: dict[str, Any] = {
        name: max(1, round(hidden_size * getattr(model, name) / model.hidden_size / multiple)) * multiple
        for name, multiple in sizes.items()
        if getattr(model, name) is not None
    }
    fields |= {"moe_every": min(model.moe_every, 2), "num_dense_layers": min(model.num_dense_layers, 1)}
    if model.num_experts <= MOST_EXPERTS and model.num_experts % parallel.expert_parallel_size == 0:
        return fields
    groups, of_token, selected = model.router_groups, model.router_groups_per_token, min(model.experts_per_token, 2)
    if groups is not None and of_token is not None:
        groups = min(4, groups)
        of_token = min(of_token, groups) if of_token == model.router_groups else min(of_token, max(1, groups - 1))
    return {
        **fields,
        "num_experts": MOST_EXPERTS,
        "experts_per_token": selected,
        "router_groups": groups if groups is None or MOST_EXPERTS % groups == 0 else 2,
        "router_groups_per_token": of_token,
    }


def _reduced_heads(model: TransformerConfig, full_tp_size: int, tp_size: int, multiple: int) -> tuple[int, int]:
    """Return heads and key-value heads; a rank has one key-value head, has several, or shares one as in the config.

    The number of heads is a multiple of `multiple`.
    """
    groups, ratio = model.kv_heads, min(4, model.num_heads // model.kv_heads)
    if groups % full_tp_size == 0:
        kv_heads = tp_size * min(2, groups // full_tp_size)
    else:
        kv_heads = tp_size // 2
    while kv_heads * ratio % multiple:
        ratio += 1
    return kv_heads * ratio, kv_heads


def _reduced_layers(config: TrainConfig, num_stages: int, cut: tuple[int, ...] | None) -> int:
    """Return one block for each stage, at least two; one more if the stages hold different numbers of blocks."""
    if cut is not None:
        return sum(cut)
    full_stages = plan_pipeline(config).num_stages
    if num_stages > 1 and config.model.num_layers < full_stages:
        return num_stages - 1  # the last stage has only the head
    uneven = num_stages > 1 and config.model.num_layers % full_stages > 0
    return max(2, num_stages + uneven)


def _reduced_vocabulary(config: TrainConfig) -> dict[str, Any]:
    """Return the fields of a vocabulary that is padded if the full one is, or if its size is not known yet."""
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
    if kind == "lion":  # it makes a full update from the sign of a rounding error, which depends on the layout
        kind = "adamw"
    eps = optimizer.eps if kind == "sgd" else EPS
    return replace(optimizer, kind=kind, lr=lr, min_lr=min(optimizer.min_lr, lr), eps=eps, clip_norm=clip)
