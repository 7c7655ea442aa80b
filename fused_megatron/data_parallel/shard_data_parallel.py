"""shard_data_parallel: ZeRO for a model in a user's own training loop."""

import zlib
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.checks import InputError, SharedInputError, check, check_divisible, dtype_name
from fused_megatron.collectives import Group
from fused_megatron.collectives.together import run_together
from fused_megatron.config.training import default_bucket_mb
from fused_megatron.data_parallel.guarded_model import guard_model
from fused_megatron.data_parallel.placement import ZERO_STAGES
from fused_megatron.data_parallel.sharded_replica import ShardedReplica
from fused_megatron.data_parallel.shared_state import replicas_of
from fused_megatron.mesh import Mesh
from fused_megatron.sharding import Replicas, expert_ranks, mark_all_shards, parameter_record
from fused_megatron.sharding.replica_shards import attach_replica_shards
from fused_megatron.sharding.replicas import find_drift

Model = TypeVar("Model", bound=nn.Module)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def shard_data_parallel(
    model: Model, mesh: Mesh, zero_stage: int, *, shard_size: int | None = None, bucket_mb: float | None = None
) -> Model:
    """Share a model's training state over the data-parallel ranks of a mesh, in place. Stages of ZeRO:

        1   each rank updates its rows of every parameter, and keeps the moments and float32 main weights of these rows
        2   as 1, and gradients accumulate as rows
        3   as 2, and weights are kept as rows; a block is whole during its forward and its backward

    When backward() returns, gradients are means over the data-parallel ranks, as with DistributedDataParallel and
    fully_shard. So write the loss as a mean over the rank's samples. Context-parallel ranks share the state, too, and
    gradients are means over them: fm.parallelize gives each of them the gradients of the whole sequences. A model of
    which a rank runs only its positions needs the sum of the losses of these positions, times context_parallel_size,
    divided by the number of targets of the samples. The state of experts is shared over the ranks that hold the same
    experts (mesh.expert_replicas), and their gradients are those of the same mean loss. Every parameter that requires a
    gradient has one in float32, which ShardedOptimizer reads; `grad` of the parameters has no meaning.

        model = fm.shard_data_parallel(fm.parallelize(model, mesh), mesh, zero_stage=3)
        optimizer = fm.ShardedOptimizer(model, torch.optim.AdamW, lr=1e-3)
        for x in batches:
            model(x).loss.backward()
            fm.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    For gradient accumulation run all backwards of a step except the last inside `with model.no_sync():`. In stage 1
    these backwards communicate nothing. In stages 2 and 3 each of them still sums its gradients over the ranks, since a
    rank keeps no whole gradients. Without no_sync the numbers are the same, with more communication.

    A forward must call the module whose weights it reads, as for fully_shard. A weight that is read outside of its
    module's forward is NaN: in stage 3 always, in stages 1 and 2 until it has arrived. In stage 3 all ranks must call
    the same modules.

    Args:
        model: any module on one device, with the same weights on every data-parallel rank; also after
            fm.parallelize. Freeze parameters before this call.
        mesh: a mesh from init_mesh. One data-parallel rank works too.
        zero_stage: 1, 2 or 3.
        shard_size: number of data-parallel ranks that share the rows; groups of this size repeat them (HSDP). The rows
            of experts are repeated as often, or less often where fewer ranks hold the same experts. None: all
            data-parallel ranks.
        bucket_mb: least size of a bucket of gradients, in 10^6 bytes of float32; None: by device and number of
            replicas, as TrainingConfig.bucket_mb.

    Returns:
        The same model, with the method no_sync().

    Raises:
        InputError: on every rank, if the arguments are wrong or do not fit the model on some rank; if the weights
            differ between data-parallel ranks; if the model is sharded over them already. The model is unchanged.
        TypeError: model is no module, or mesh is not from init_mesh.

    Communication: this call makes a few small exchanges. In training stage 1 makes a reduce-scatter of 4 bytes an
        element and an all-gather of the weights in each step. Stage 2 makes the reduce-scatter in each backward. Stage
        3 also makes the all-gather before each forward and each backward. Each step makes an all-reduce of 4 bytes for
        each parameter tensor, by which every rank knows whether some rank used it.
    Memory: as GradientBuckets, and ShardedWeights in stage 3.

    Paper: ZeRO (Rajbhandari et al., arXiv 1910.02054).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__} must be a torch.nn.Module")
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh={type(mesh).__name__} must be what fused_megatron.init_mesh returns, with an axis 'dp'")
    world = dist.group.WORLD if mesh.world_size > 1 else None
    size = mesh.replicas.size if shard_size is None else shard_size
    if bucket_mb is None:
        device_type = next((parameter.device.type for parameter in model.parameters()), "cpu")
        bucket_mb = default_bucket_mb(device_type, mesh.replicas.size)
    has_experts = _any_has_experts(model, mesh, zero_stage, size, bucket_mb, world)
    replicas = replicas_of(mesh, ZERO_STAGES[zero_stage], size, has_experts)
    _check_equal_weights(model, replicas, world)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    replica = ShardedReplica(model, ZERO_STAGES[zero_stage], replicas, 1e6 * bucket_mb)
    attach_replica_shards(model, replica)
    guard_model(model, replica)
    return model


def _any_has_experts(
    model: nn.Module, mesh: Mesh, zero_stage: int, shard_size: int, bucket_mb: float, world: Group
) -> bool:
    """Return whether the model of some rank has experts. Raise on every rank if the arguments of one are wrong."""

    def checked() -> tuple[list[int], int, bool]:
        check(
            not isinstance(zero_stage, bool) and zero_stage in (1, 2, 3),
            f"zero_stage={zero_stage!r} must be 1, 2 or 3 (0 shares nothing: DistributedDataParallel does that)",
        )
        check(bucket_mb > 0, f"bucket_mb={bucket_mb} must be above 0")
        check(
            shard_size > 1 or shard_size == mesh.replicas.size == 1,
            f"shard_size={shard_size} must be 2 or more, or None for all data-parallel ranks",
        )
        check_divisible(mesh.replicas_text, mesh.replicas.size, "shard_size", shard_size)
        _check_model(model, zero_stage)
        facts = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
        group = mesh.replicas.group
        ranks = [0] if group is None else dist.get_process_group_ranks(group)
        digest = zlib.crc32(repr((facts, zero_stage, shard_size, bucket_mb)).encode())
        return ranks, digest, expert_ranks(model) is not None

    answers = run_together(world, checked)
    for ranks, own, _ in answers:
        different = [rank for rank in ranks if answers[rank][1] != own] if world is not None else []
        if different:
            raise SharedInputError(
                f"ranks {different} have another model, or other arguments, than rank {ranks[0]}: build the same on "
                "all data-parallel ranks"
            )
    return any(has_experts for *_, has_experts in answers)


def _check_equal_weights(model: nn.Module, replicas: Replicas, world: Group) -> None:
    """Raise on every rank if replicas hold different weights."""
    mark_all_shards(model)
    sets = list(replicas.split(dict(model.named_parameters())))

    def drift() -> str | None:
        found = [find_drift(parameters, each.group, ()) for each, parameters in sets]
        return next(filter(None, found), None)

    found = next(filter(None, run_together(world, drift)), None)
    if found:
        raise SharedInputError(
            f"{found} (load the same weights on all data-parallel ranks, or call torch.manual_seed with one seed "
            "before building the model)"
        )


def _check_model(model: nn.Module, zero_stage: int) -> None:
    parameters = dict(model.named_parameters())
    check(any(p.requires_grad for p in parameters.values()), f"{type(model).__name__} has no parameter to train")
    wrapped = [type(m).__name__ for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    wrapped += [type(p).__name__ for p in parameters.values() if hasattr(p, "device_mesh")]
    if wrapped:
        raise InputError(f"the model has a {wrapped[0]} already (pass the module without DDP or FSDP around it)")
    devices = {p.device for p in parameters.values()}
    check(len(devices) == 1, f"the parameters are on {len(devices)} devices (move the model to one)")
    check(devices != {torch.device("meta")}, "the model is on the meta device (fill it before shard_data_parallel)")
    for name, p in parameters.items():
        check(
            parameter_record(p).summed_grad is None,
            f"{name} is in buckets of data-parallel ranks already (call shard_data_parallel once)",
        )
        if p.requires_grad or zero_stage == 3:
            check(
                p.dtype in _DTYPES,
                f"{name}.dtype={dtype_name(p.dtype)} must be one of: {', '.join(map(dtype_name, _DTYPES))}",
            )
