"""parallelize: sharding of an existing model over tensor- and context-parallel ranks, in place."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.collectives import Group, group_size
from fused_megatron.interop.adapters import adapted_models
from fused_megatron.interop.agreement import agreement_of_ranks
from fused_megatron.interop.context_plan import plan_context
from fused_megatron.interop.parallel_report import make_report, refuse_blocked, refuse_left
from fused_megatron.interop.plans import find_plan
from fused_megatron.interop.preparation import Preparation
from fused_megatron.interop.random_draws import guard_draws
from fused_megatron.interop.replacements import cut
from fused_megatron.interop.saving import guard_saving
from fused_megatron.interop.shared_inputs import guard_inputs
from fused_megatron.interop.split_experts import expert_split_of
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
    context_parallel_method: str = "ring",
) -> Model:
    """Shard a model over the tensor- and context-parallel ranks of a mesh, in place. The weights stay the model's own.

    Linears, the embedding and the head become parallel layers; norms, gated MLPs and rotary embeddings are fused. The
    model returns the same as before, on every rank: logits, loss, generated tokens. Each rank's gradients belong to its
    shards. Training loops, generate and gradient checkpointing need no change. The parameters stay the same objects
    with other shapes, so an optimizer may exist already, if it has made no step. full_state_dict gathers the original
    weights.

    The plan decides how each layer is sharded: the user's plan; else the model's own (tp_plan of transformers); else a
    table of known layers (GPT-2, BERT and similar models). Styles are named as in transformers: "colwise", "rowwise",
    "colwise_gather_output", "rowwise_split_input", "packed_colwise" (2 parts), "embedding_rowwise",
    "replicated_with_grad_allreduce", "replicate", and our "packed_colwise_3", "interleaved_colwise",
    "embedding_colwise" and "experts". A layer that no plan names is replicated, and the report names it. A layer that
    cannot be sharded is replicated together with the layers that exchange shards with it.

    Experts are divided, and the routes of the model's own router are kept: over tp the features of each expert, with
    the results summed; with expert_parallel_size or expert_tensor_parallel_size above 1 in the mesh, whole experts or
    their features over the ranks of ep and etp, to which tokens move. Ranks of ep may have other samples. The
    gradients of their experts are sums over the losses of all of them (fm.shard_data_parallel averages them as it
    averages dense gradients).

    The model's own cross-entropy is computed from shards of the logits, without a float32 copy or a softmax of the
    full logits. It uses the full logits under torch.compile, or if the model does more to them than reshaping,
    conversion, scaling or a soft cap.

    With an axis cp the layers of a transformers model hold only this rank's positions of each sequence while gradients
    are recorded; attention exchanges keys and values. Every rank gives the same inputs, whole sequences, and gets the
    same logits, loss and gradients. This needs a decoder or an encoder whose attention goes through transformers'
    attention interface (Llama, Mistral, Qwen, Gemma, GPT-2), without dropout in its layers. Padding may be given as
    attention_mask [B, S], and packed documents as position_ids that start anew (with use_cache=False, as transformers
    needs it). A forward with gradients returns no cache.

    Replicated activations need the same dropout masks on every rank: call torch.manual_seed with one seed on all ranks.

    Args:
        model: a torch.nn.Module with the same weights on every rank, on any device. On the meta device the shards stay
            there; fill them with load_pretrained_shards, or with load_full_state_dict after to_empty.
        mesh: what init_mesh returns, a torch DeviceMesh with an axis "tp" or "cp", or a process group (tp).
        plan: {pattern: style}. A pattern is the end of a module's name, and * is any one part: {"mlp.up": "colwise"}.
            The style "default" takes the model's own: {"*": "default", "self_attn.*": "replicate"} extends its plan.
        sequence_parallel: between attention and MLP, a rank holds only its block [B, S / R, H] of the activations
            while gradients are recorded. R must divide the sequence length.
        overlap: overlap products with their collectives, as in ColumnParallelLinear.
        gather_logits: return full logits [.., V]. False: while gradients are recorded, logits are this rank's columns
            [.., ceil(V / R)] (columns from V on are padding), never gathered, and computed only when they are read. The
            model's own loss stays right, without them; for another loss use vocab_parallel_cross_entropy.
        strict: raise if a layer with a matrix would be replicated without being planned so: no plan names it, or it
            cannot be sharded.
        context_parallel_method: "ring", "all_gather", "all_to_all" or "all_to_all+ring", as in
            context_parallel.context_parallel_attention.

    Returns:
        The model, with model.parallel_report (a ParallelReport; print it).

    Raises:
        InputError: sizes that R does not divide, experts that the mesh cannot divide or that have LoRA, an unknown
            style, a pattern that matches nothing, ranks with different models or weights, a layer that strict refuses;
            with an axis cp a model that does not fit, or sequence_parallel=True. The model is unchanged on every rank.
        TypeError: model is no module, or mesh is no mesh.

    Communication: small all-gathers here. In the model: one all-reduce per attention, MLP and embedding in forward,
        one per attention, MLP and head in backward, and one all-gather of the logits. With an axis cp, also that of
        the method in each attention, an all-gather of the activations [B, S, H] after the last layer and, in backward,
        before the first; in backward an all-reduce of the gradients of each module of the layers, in float32.
    Memory: old and new weights together, until all shards are made.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__} must be a torch.nn.Module")
    tp_group = group_of(mesh)
    cp_group = _context_group_of(mesh)
    expert_split = expert_split_of(mesh, tp_group)
    with _agreement_of_axes(model, tp_group, cp_group, expert_split.all_groups):
        if hasattr(model, "parallel_report"):
            raise InputError("model is parallel already (full_state_dict has its whole weights for a fresh one)")
        if replica_shards(model) is not None:
            raise InputError("model has shared rows already (parallelize before shard_data_parallel)")
        context = plan_context(model, cp_group, context_parallel_method, group_size(tp_group))
        if context is not None and sequence_parallel:
            raise InputError(
                "sequence_parallel=True with context_parallel_size above 1: the axis cp divides the activations "
                "already (sequence_parallel=False)"
            )
        work = Preparation(model, tp_group, find_plan(model, plan), overlap, gather_logits, expert_split)
        work.prepare(sequence_parallel)
        report = make_report(work, context)
        refuse_blocked(work)
        if strict:
            refuse_left(report, work)
    with _agreement_of_axes(model, tp_group, cp_group, expert_split.all_groups, same_weights=False):
        shards = cut(work.replacements, tp_group)
    work.commit(shards)
    if context is not None:
        context.install()
    guard_draws(model)
    guard_inputs(model)
    for one in adapted_models(model):
        guard_saving(one)
        one.parallel_report = report  # type: ignore[assignment]
    if not report.sharded:
        warnings.warn(
            f"nothing of {type(model).__name__} was sharded: {report.plan} names no layer that could be "
            "(plan={pattern: style} says what; print(model.parallel_report) why)",
            stacklevel=2,
        )
    return model


@contextmanager
def _agreement_of_axes(
    model: nn.Module, tp_group: Group, cp_group: Group, expert_group: Group, same_weights: bool = True
) -> Iterator[None]:
    with (
        agreement_of_ranks(model, expert_group, same_weights, "expert-parallel"),
        agreement_of_ranks(model, cp_group, same_weights, "context-parallel"),
        agreement_of_ranks(model, tp_group, same_weights),
    ):
        yield


def _context_group_of(mesh: Any) -> Group:
    """Return the context-parallel group of a mesh (ours or torch's); None without this axis."""
    if isinstance(mesh, Mesh):
        return mesh["cp"].group
    if "cp" not in (getattr(mesh, "mesh_dim_names", None) or ()):
        return None
    group: Group = mesh["cp"].get_group()
    return group if group_size(group) > 1 else None


def group_of(mesh: Any) -> Group:
    """Return the tensor-parallel group of a mesh (ours or torch's); a process group returns itself.

    Raises:
        InputError: a mesh without an axis "tp" or "cp", a group without this rank.
        TypeError: neither a mesh nor a group.
    """
    if isinstance(mesh, Mesh):
        return mesh.tp_group
    names = getattr(mesh, "mesh_dim_names", ())
    if names and "tp" not in names and "cp" in names:
        return None
    if names is None or (names and "tp" not in names):
        raise InputError(f"mesh.mesh_dim_names={names} must have 'tp' (fused_megatron.init_mesh makes such a mesh)")
    if names:
        group: Group = mesh["tp"].get_group()
        return group if group_size(group) > 1 else None
    if mesh is None or callable(getattr(mesh, "size", None)):
        group_size(mesh)
        return mesh
    raise TypeError(f"mesh={type(mesh).__name__} must be what fused_megatron.init_mesh returns, or a process group")
