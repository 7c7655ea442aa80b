"""The parts of a layout that can be switched off: mesh axes, microbatches, recomputation, overlap."""

from collections.abc import Collection
from dataclasses import replace
from math import gcd

from fused_megatron.config import ParallelConfig, TrainConfig

MICROBATCHES, RECOMPUTE, TENSOR, SEQUENCE = "microbatches", "recomputation", "tensor parallel", "sequence parallel"
OVERLAP, PIPELINE, CONTEXT, DATA = "overlap", "pipeline parallel", "context parallel", "data parallel"
EXPERT = "expert parallel"

AXES = {"tp": TENSOR, "pp": PIPELINE, "cp": CONTEXT, "dp": DATA}
"""Axes of the mesh, with their names in a report."""

# Each part, with the parts that must be in use for it to have an effect.
NEEDS = {
    MICROBATCHES: (),
    RECOMPUTE: (),
    TENSOR: (),
    SEQUENCE: (TENSOR,),
    OVERLAP: (TENSOR,),
    PIPELINE: (),
    CONTEXT: (),
    DATA: (),
    EXPERT: (TENSOR, CONTEXT, DATA),  # the parts in use: experts are divided over these ranks
}


def parts_of(config: TrainConfig) -> tuple[str, ...]:
    """Return the parts that a layout uses, in the order of NEEDS."""
    parallel, training = config.parallel, config.training
    tensor, replicas = parallel.tensor_parallel_size > 1, parallel.data_parallel_size or 1
    used = {
        MICROBATCHES: training.microbatch_size * replicas < training.global_batch_size,
        RECOMPUTE: config.model.recompute != "none",
        TENSOR: tensor,
        SEQUENCE: tensor and parallel.sequence_parallel,
        OVERLAP: tensor and parallel.overlap is not False,
        PIPELINE: parallel.pipeline_parallel_size > 1
        or (parallel.stages_per_rank or 1) > 1
        or parallel.schedule is not None,
        CONTEXT: parallel.context_parallel_size > 1,
        DATA: replicas > 1,
        EXPERT: parallel.expert_parallel_size * parallel.expert_tensor_parallel_size > 1,
    }
    return tuple(part for part in NEEDS if used[part])


def with_parts(config: TrainConfig, parts: Collection[str]) -> TrainConfig:
    """Return the config with only these parts of its layout; model, batch and updates stay the same.

    Without any part it is the config of one process that takes the whole batch at once and keeps all activations.
    """
    parallel, training, model = config.parallel, config.training, config.model
    if TENSOR not in parts:
        parallel = replace(parallel, tensor_parallel_size=1)
    if SEQUENCE not in parts:
        parallel = replace(parallel, sequence_parallel=False)
    if OVERLAP not in parts:
        parallel = replace(parallel, overlap=False)
    if PIPELINE not in parts:
        parallel = replace(parallel, pipeline_parallel_size=1, stages_per_rank=None, schedule=None, pipeline_cut=None)
    parallel = _with_experts(_with_replicas(parallel, parts), parts)
    if MICROBATCHES not in parts:
        per_replica = training.global_batch_size // (parallel.data_parallel_size or 1)
        training = replace(training, microbatch_size=per_replica)
    if RECOMPUTE not in parts:
        model = replace(model, recompute="none", recompute_blocks=None)
    return replace(config, parallel=parallel, training=training, model=model)


def _with_replicas(parallel: ParallelConfig, parts: Collection[str]) -> ParallelConfig:
    """Return the layout with the replicas of these parts. ZeRO is a part of data parallelism, if that is in use."""
    has_data = (parallel.data_parallel_size or 1) > 1
    ranks = parallel.context_parallel_size if CONTEXT in parts else 1
    if DATA not in parts and (has_data or ranks == 1):
        stage = None if ranks == 1 else 0
        parallel = replace(parallel, zero_stage=stage, zero_shard_size=None, zero_gather="block")
    size = parallel.data_parallel_size if DATA in parts else 1
    if parallel.zero_shard_size is not None and (size or 1) * ranks % parallel.zero_shard_size:
        parallel = replace(parallel, zero_shard_size=None)
    return replace(parallel, data_parallel_size=size, context_parallel_size=ranks)


def _with_experts(parallel: ParallelConfig, parts: Collection[str]) -> ParallelConfig:
    """Return the layout with experts divided over no more ranks than a pipeline stage has."""
    ranks = parallel.tensor_parallel_size * parallel.replicas(parallel.data_parallel_size or 1)
    size = gcd(parallel.expert_parallel_size, ranks) if EXPERT in parts else 1
    shards = gcd(parallel.expert_tensor_parallel_size, ranks // size) if EXPERT in parts else 1
    return replace(parallel, expert_parallel_size=size, expert_tensor_parallel_size=shards)


def describe_layout(config: TrainConfig) -> str:
    """Return the parts of a layout as text: "tp 2 (sequence parallel) x pp 2 (1f1b) x dp 2"."""
    parallel, parts = config.parallel, parts_of(config)
    words = []
    if TENSOR in parts:
        with_sequence = " (sequence parallel)" if SEQUENCE in parts else ""
        words.append(f"tp {parallel.tensor_parallel_size}{with_sequence}")
    if PIPELINE in parts:
        stages = f", {parallel.stages_per_rank} stages a rank" if (parallel.stages_per_rank or 1) > 1 else ""
        words.append(f"pp {parallel.pipeline_parallel_size} ({parallel.schedule}{stages})")
    if CONTEXT in parts:
        zero = "" if DATA in parts else _zero(parallel)
        words.append(f"cp {parallel.context_parallel_size} ({parallel.context_parallel_method}){zero}")
    if DATA in parts:
        words.append(f"dp {parallel.data_parallel_size}{_zero(parallel)}")
    if EXPERT in parts:
        shards = parallel.expert_tensor_parallel_size
        words[-1] += f" with ep {parallel.expert_parallel_size}" + f" x etp {shards}" * (shards > 1)
    rest = [part for part in parts if part in (MICROBATCHES, RECOMPUTE, OVERLAP)]
    return " x ".join(words or ["one rank"]) + (f", {', '.join(rest)}" if rest else "")


def _zero(parallel: ParallelConfig) -> str:
    """Return the ZeRO stage as text; "" for the default."""
    if parallel.zero_stage is None:
        return ""
    shards = "" if parallel.zero_shard_size is None else f" over {parallel.zero_shard_size}"
    return f" (ZeRO {parallel.zero_stage}{shards})"
