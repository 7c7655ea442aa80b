"""Memory of a GPU under a training program: our own or Megatron-core, with what CUDA, NCCL and the allocator hold.

rank_memory counts tensors of our own layers. Published figures are of a device: they have tensors that Megatron keeps
(megatron_tensors.py), and memory outside of tensors. Each constant of the second kind is stated once, here.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from fused_megatron.config import ParallelConfig, TrainConfig
from fused_megatron.models import StageSpan
from fused_megatron.planning.block_backward import BackwardMoment, block_backward
from fused_megatron.planning.bucket_memory import Made
from fused_megatron.planning.megatron_tensors import (
    FIRST,
    LAST,
    Sizes,
    block_bytes,
    kept_bytes,
    logits_bytes,
    sizes_of,
)
from fused_megatron.planning.parameter_counts import block_parameters
from fused_megatron.planning.prediction.cluster import Cluster
from fused_megatron.planning.prediction.engine import OWN, engine_of
from fused_megatron.planning.rank_memory import RankMemory, rank_memory
from fused_megatron.planning.working_memory import StageBytes

CONTEXT_BYTES = int(1.3e9)
"""CUDA context, kernels of torch, cuBLAS, cuDNN and Transformer Engine, and workspaces of products."""
COMMUNICATOR_BYTES = int(0.3e9)
"""Buffers of NCCL for each group of ranks that sends."""
SCATTERED = 0.05
"""Share of optimizer state, activations and temporary tensors that the allocator holds beyond them in fragments.

Weights and gradients are few large buffers, made once, and lose nothing.
"""
_MOMENT_BYTES = 8


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a GPU at the peak of a step.

    Attributes:
        parts: bytes of tensors by what they are: weights, gradients, optimizer, activations, working.
        overheads: bytes beside tensors: context, communicators, allocator.
    """

    parts: Mapping[str, int]
    overheads: Mapping[str, int]

    @property
    def overhead(self) -> int:
        """Bytes beside tensors."""
        return sum(self.overheads.values())

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.parts.values()) + self.overhead


def device_memory(
    config: TrainConfig,
    cluster: Cluster | None = None,
    engine: str = OWN,
    pp_rank: int | Collection[int] | None = None,
) -> DeviceMemory:
    """Compute the memory of the GPU that needs most.

    Args:
        config: model.vocab_size must be given. For Megatron zero_stage=0 is its plain optimizer, 1 its distributed one.
        cluster: a machine of CPUs has no overheads. None: GPUs.
        engine: key of ENGINES. The Megatron programs keep the tensors of megatron_tensors.py; llm-foundry counts as
            our own.
        pp_rank: pipeline rank; several: the rank of these that needs most; None: the rank that needs most.

    Raises:
        InputError: an unknown engine; as rank_memory.
    """
    facts = engine_of(engine)
    device = "cuda" if cluster is None else cluster.device
    if not engine.startswith("megatron"):
        memory = rank_memory(config, pp_rank, device=device)
        return _with_overheads(config, cluster, memory, 0)

    def of_stage(span_config: TrainConfig, span: StageSpan) -> StageBytes:
        return _megatron_stage(span_config, span, facts.fused_attention)

    config = _evenly_cut(config)
    ranks = (pp_rank,) if isinstance(pp_rank, int) else pp_rank or range(config.parallel.pipeline_parallel_size)
    logits = _head_bytes(sizes_of(config))
    found = [
        _with_overheads(
            config,
            cluster,
            rank_memory(config, rank, of_stage=of_stage, device=device),
            logits if rank == _rank_of_the_head(config) else 0,
        )
        for rank in ranks
    ]
    return max(found, key=lambda memory: memory.total)


def _evenly_cut(config: TrainConfig) -> TrainConfig:
    """Return the config with the same number of blocks in every stage, as Megatron cuts, if it divides them."""
    parallel = config.parallel
    num_stages = parallel.pipeline_parallel_size * (parallel.stages_per_rank or 1)
    if num_stages == 1 or parallel.pipeline_cut is not None or config.model.num_layers % num_stages:
        return config
    cut = (config.model.num_layers // num_stages,) * num_stages
    return replace(config, parallel=replace(parallel, pipeline_cut=cut))


def _rank_of_the_head(config: TrainConfig) -> int:
    """Return the pipeline rank of the last stage; Megatron's schedules place it on the last rank."""
    return config.parallel.pipeline_parallel_size - 1


def _with_overheads(config: TrainConfig, cluster: Cluster | None, memory: RankMemory, logits: int) -> DeviceMemory:
    """Add the memory beside tensors.

    The moments of Adam come to memory after the first backward, into segments that activations left. In later steps
    activations move to the segments of the logits, and the logits get new ones: as many bytes again, but no more than
    the moments.
    """
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "working": memory.working,
    }
    if cluster is not None and cluster.device == "cpu":
        return DeviceMemory(parts, {"context": 0, "communicators": 0, "allocator": 0})
    moments = memory.optimizer * _MOMENT_BYTES // (12 if config.training.weight_dtype != "float32" else 8)
    overheads = {
        "context": CONTEXT_BYTES,
        "communicators": communicator_bytes(config.parallel),
        "allocator": round(SCATTERED * (memory.optimizer + memory.activations + memory.working)) + min(logits, moments),
    }
    return DeviceMemory(parts, overheads)


def communicator_bytes(parallel: ParallelConfig) -> int:
    """Compute the bytes of a rank's groups: one for each axis, one for the norm of a model's shards, one of all."""
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    replicas = parallel.replicas(parallel.data_parallel_size or 1)
    experts = parallel.expert_parallel_size * parallel.expert_tensor_parallel_size
    axes = (tp, pp, parallel.context_parallel_size, replicas, experts, tp * pp, tp * pp * replicas)
    return COMMUNICATOR_BYTES * sum(size > 1 for size in axes)


def _head_bytes(sizes: Sizes) -> int:
    """Compute the bytes of the logits and of their float32 softmax."""
    return logits_bytes(sizes) + 4 * sizes.tokens * sizes.vocabulary


def _megatron_stage(config: TrainConfig, span: StageSpan, fused: bool) -> StageBytes:
    """Compute the bytes that one microbatch of a stage of Megatron-core needs.

    recompute="full" keeps the input of each recomputed block; backward has the tensors of one block at a time.
    """
    model, sizes = config.model, sizes_of(config)
    has_experts = [model.has_experts(block) for block in range(span.start, span.stop)]
    full = {kind: block_bytes(config, sizes, kind, fused) for kind in set(has_experts)}
    recomputed = model.recomputed_blocks(len(has_experts)) if model.recompute == "full" else 0
    residual = sizes.size * sizes.own * sizes.hidden
    blocks = [residual if index < recomputed else full[kind] for index, kind in enumerate(has_experts)]
    kept = sum(blocks) + (kept_bytes(FIRST, config, sizes, fused) if span.first else 0)
    again = max((full[kind] - residual for kind in has_experts[:recomputed]), default=0)
    plain = replace(config, model=replace(model, recompute="none", recompute_blocks=None, attention_dropout=0.0))
    working = again + max(
        (moment.num_bytes for kind in full for moment in block_backward(plain, kind, False)), default=0
    )
    backward = kept + working
    moments = [
        BackwardMoment(
            sum(blocks[: len(blocks) - index]) + working,
            Made(block_parameters(model, config.parallel, has_experts[-1 - index]).total),
        )
        for index in range(len(blocks))
    ]
    if span.last:
        kept += kept_bytes(LAST, config, sizes, fused) + sizes.statistics * sizes.own
        backward = max(backward, kept + logits_bytes(sizes))
    forward = kept + (logits_bytes(sizes) if span.last else 0)
    return StageBytes(kept, kept, forward, backward, backward, kept, lambda: (*moments, BackwardMoment(0)))
