"""parallelize: a model that somebody has, sharded over tensor-parallel ranks in place."""

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
    """Shard a model's layers over the tensor-parallel ranks of a mesh, in place, with the weights that it has.

    Linears, the embedding and the head become parallel ones, norms and activations fused ones. The model returns what
    it returned before, the same on every rank: logits, loss, generated tokens; gradients are those of the shards.
    Training loops, generate and gradient checkpointing go on as they are. Parameters stay the same objects, with other
    shapes: an optimizer may be made before, as long as it has made no step. full_state_dict is the way back.

    Which layer becomes what says the plan: the user's; else the model's own (tp_plan of transformers); else a table of
    known layers (GPT-2, BERT and their kin). Styles as in transformers: "colwise", "rowwise", "colwise_gather_output",
    "rowwise_split_input", "packed_colwise" (2 parts), "packed_colwise_3", "embedding_rowwise",
    "replicated_with_grad_allreduce", "replicate". A layer that no plan names stays whole and is named in the report;
    so does one that cannot be sharded, together with the layers beside it that its shards would go to.

    The model's own cross-entropy is computed from shards of the logits, without a copy or a softmax of the whole; under
    torch.compile, and where something else than scaling or a soft cap happens to them before, from the whole.

    Dropout is the same on every rank where all draw alike (torch.manual_seed with one seed), which replicated
    activations need.

    Args:
        model: a torch.nn.Module with the same weights on every rank; on any device. On the meta device its shards stay
            there, for load_full_state_dict to fill after to_empty.
        mesh: of init_mesh; a torch DeviceMesh with an axis "tp", or a process group.
        plan: {pattern: style}; a pattern is the end of a module's name, * any one part of it: {"mlp.up": "colwise"}.
        sequence_parallel: between attention and MLP a rank holds its block [B, S / R, H] of the activations, while
            gradients are recorded; R must then divide the sequence length.
        overlap: products and their collectives side by side, as ColumnParallelLinear has it.
        gather_logits: whether the model's logits are whole. False: while gradients are recorded they are this rank's
            columns [.., ceil(V / R)] (those from V on are padding), which are never gathered; the model's own loss is
            right, and vocab_parallel_cross_entropy is for losses outside of it.
        strict: refuse what would otherwise be left whole and named: a layer with a matrix that no plan names, or one
            that cannot be sharded.

    Returns:
        The model, with model.parallel_report (a ParallelReport; print it).

    Raises:
        InputError: sizes that R does not divide, an unknown style, a pattern that matches nothing, ranks whose models
            or weights differ, what strict refuses. The model is then as it was, on every rank.
        TypeError: no module, no mesh.

    Communication: small all-gathers here. In the model: one all-reduce an attention, an MLP and the embedding forward,
        one an attention, an MLP and the head backward, and one all-gather of the logits.
    Memory: the old weights are held until all new ones are made.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__} must be a torch.nn.Module")
    tp_group = group_of(mesh)
    with agreement_of_ranks(model, tp_group):
        if hasattr(model, "parallel_report"):
            raise InputError("model is parallel already (full_state_dict has its whole weights for a fresh one)")
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
    """The tensor-parallel group of a mesh, ours or torch's, or the group itself.

    Raises:
        InputError: a mesh without an axis tp, a group without this rank.
        TypeError: something else.
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
