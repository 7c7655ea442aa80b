"""parallelize: sharding of an existing model over tensor-parallel ranks, in place."""

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.collectives import Group, group_size
from fused_megatron.interop.agreement import agreement_of_ranks
from fused_megatron.interop.parallel_report import make_report, refuse_blocked, refuse_left
from fused_megatron.interop.plans import find_plan
from fused_megatron.interop.preparation import Preparation
from fused_megatron.interop.replacements import cut
from fused_megatron.interop.saving import guard_saving
from fused_megatron.mesh import Mesh
from fused_megatron.sharding.replica_shards import replica_shards

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    mesh: Any,
    plan: Mapping[str, str] | None = None,
    *,
    sequence_parallel: bool = False,
    overlap: bool | int = True,
    gather_logits: bool = True,
    strict: bool = False,
) -> Model:
    """Shard a model's layers over the tensor-parallel ranks of a mesh, in place. The weights stay the model's own.

    Linears, the embedding and the head become parallel layers; norms and activations become fused ones. The model
    returns the same as before, on every rank: logits, loss, generated tokens. Each rank's gradients belong to its
    shards. Training loops, generate and gradient checkpointing need no change. The parameters stay the same objects
    with other shapes, so an optimizer may exist already, if it has made no step. full_state_dict gathers the original
    weights.

    The plan decides how each layer is sharded: the user's plan; else the model's own (tp_plan of transformers); else a
    table of known layers (GPT-2, BERT and similar models). Styles are named as in transformers: "colwise", "rowwise",
    "colwise_gather_output", "rowwise_split_input", "packed_colwise" (2 parts), "embedding_rowwise",
    "replicated_with_grad_allreduce", "replicate", and our "packed_colwise_3", "interleaved_colwise" and
    "embedding_colwise". A layer that no plan names is replicated, and the report names it. A layer that cannot be
    sharded is replicated together with the layers that exchange shards with it.

    The model's own cross-entropy is computed from shards of the logits, without a float32 copy or a softmax of the
    full logits. It uses the full logits under torch.compile, or if the model does more to them than reshaping,
    conversion, scaling or a soft cap.

    Replicated activations need the same dropout masks on every rank: call torch.manual_seed with one seed on all ranks.

    Args:
        model: a torch.nn.Module with the same weights on every rank, on any device. On the meta device the shards stay
            there; fill them with load_pretrained_shards, or with load_full_state_dict after to_empty.
        mesh: what init_mesh returns, a torch DeviceMesh with an axis "tp", or a process group.
        plan: {pattern: style}. A pattern is the end of a module's name, and * is any one part: {"mlp.up": "colwise"}.
        sequence_parallel: between attention and MLP, a rank holds only its block [B, S / R, H] of the activations
            while gradients are recorded. R must divide the sequence length.
        overlap: overlap products with their collectives, as in ColumnParallelLinear.
        gather_logits: return full logits [.., V]. False: while gradients are recorded, logits are this rank's columns
            [.., ceil(V / R)] (columns from V on are padding) and never gathered. The model's own loss stays right; for
            another loss use vocab_parallel_cross_entropy.
        strict: raise if a layer with a matrix would be replicated without being planned so: no plan names it, or it
            cannot be sharded.

    Returns:
        The model, with model.parallel_report (a ParallelReport; print it).

    Raises:
        InputError: sizes that R does not divide, an unknown style, a pattern that matches nothing, ranks with different
            models or weights, a layer that strict refuses. The model is unchanged on every rank.
        TypeError: model is no module, or mesh is no mesh.

    Communication: small all-gathers here. In the model: one all-reduce per attention, MLP and embedding in forward,
        one per attention, MLP and head in backward, and one all-gather of the logits.
    Memory: old and new weights together, until all shards are made.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__} must be a torch.nn.Module")
    tp_group = group_of(mesh)
    with agreement_of_ranks(model, tp_group):
        if hasattr(model, "parallel_report"):
            raise InputError("model is parallel already (full_state_dict has its whole weights for a fresh one)")
        if replica_shards(model) is not None:
            raise InputError("model has shared rows already (parallelize before shard_data_parallel)")
        work = Preparation(model, tp_group, find_plan(model, plan), overlap, gather_logits)
        work.prepare(sequence_parallel)
        report = make_report(work)
        refuse_blocked(work)
        if strict:
            refuse_left(report, work)
    with agreement_of_ranks(model, tp_group, same_weights=False):
        shards = cut(work.replacements, tp_group)
    work.commit(shards)
    guard_saving(model)
    model.parallel_report = report  # type: ignore[assignment]
    if not report.sharded:
        warnings.warn(
            f"nothing of {type(model).__name__} was sharded: {report.plan} names no layer that could be "
            "(plan={pattern: style} says what; print(model.parallel_report) why)",
            stacklevel=2,
        )
    return model


def group_of(mesh: Any) -> Group:
    """Return the tensor-parallel group of a mesh (ours or torch's); a process group returns itself.

    Raises:
        InputError: a mesh without an axis "tp", a group without this rank.
        TypeError: neither a mesh nor a group.
    """
    if isinstance(mesh, Mesh):
        return mesh.tp_group
    names = getattr(mesh, "mesh_dim_names", ())
    if names is None or (names and "tp" not in names):
        raise InputError(f"mesh.mesh_dim_names={names} must have 'tp' (fused_megatron.init_mesh makes such a mesh)")
    if names:
        group: Group = mesh["tp"].get_group()
        return group if group_size(group) > 1 else None
    if mesh is None or callable(getattr(mesh, "size", None)):
        group_size(mesh)
        return mesh
    raise TypeError(f"mesh={type(mesh).__name__} must be what fused_megatron.init_mesh returns, or a process group")
