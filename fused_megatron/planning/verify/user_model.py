"""Verification of a user's own module: comparison of its tensors on a mesh and on one process."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import InputError, check
from fused_megatron.mesh import Mesh
from fused_megatron.planning.verify.comparison import FLOAT32, Comparison, Reference, compare
from fused_megatron.planning.verify.config_check import TIMEOUT_S, check_starts_own_ranks, describe_error
from fused_megatron.planning.verify.layout_parts import AXES
from fused_megatron.planning.verify.layout_run import NUM_UPDATES
from fused_megatron.planning.verify.likely_axis import Cause, find_cause
from fused_megatron.planning.verify.module_run import FunctionOfFile, ModuleRun, run_module
from fused_megatron.planning.verify.records import LOSS, OUTPUT, RankRecord
from fused_megatron.planning.verify.reduced_config import MOST_RANKS
from fused_megatron.planning.verify.verification import LayoutResult, Verification
from fused_megatron.testing.run_on_ranks import RankError, check_sent_to_ranks, run_on_ranks

_SIZES = {
    "tp": "tensor_parallel_size",
    "dp": "data_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "pp": "pipeline_parallel_size",
}


RunModule = Callable[[ModuleRun], list[RankRecord]]
"""Function that trains a module on its own ranks and returns the record of each rank."""


def run_module_on_ranks(run: ModuleRun) -> list[RankRecord]:
    """Call run_module on new gloo ranks. Raises RankError as run_on_ranks does."""
    functions = (run.build_model, run.loss_fn, run.reduce_gradients)
    files = [(each.module_name, each.path) for each in functions if isinstance(each, FunctionOfFile)]
    return run_on_ranks(run_module, run.num_ranks, run, timeout_s=TIMEOUT_S, preload=files)


def verify(
    build_model: Callable[[Any], nn.Module],
    mesh_sizes: Mapping[str, int],
    batch: Any,
    *,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    reduce_gradients: Callable[[nn.Module, Mesh], None] | None = None,
    lr: float = 1e-3,
    seed: int = 0,
    tolerance: float = FLOAT32,
    run: RunModule = run_module_on_ranks,
) -> Verification:
    """Check that a sharded module computes the same as the module on one process.

        def build_model(mesh):                       # at the top level of a file
            model = MyModel()
            return model if mesh is None else fm.parallelize(model, mesh)

        if __name__ == "__main__":
            result = fm.verify(build_model, {"tp": 2}, {"input_ids": ids, "labels": ids})
            print(result.table())
            assert result

    Both are trained on the CPU in float32 and eval mode for three updates of AdamW. The loss, every gradient, their
    norm and the weights are compared, shard by shard. Before training, norms and biases are moved away from 1 and 0,
    which would hide a fault. docs/verify.md says what this proves.

    Args:
        build_model: called on every rank with its mesh, and once with None for one process; returns the module. torch
            is seeded the same before every call. It may call parallelize, or build layers with mesh.tp_group.
        mesh_sizes: size of each axis: {"tp": 2, "dp": 2}, or with the names of init_mesh; eight ranks at most.
        batch: one tensor, a tuple of tensors (positional arguments of the module), or a mapping (keyword arguments). A
            data-parallel rank gets its rows of every tensor.
        loss_fn: computes a scalar loss from the module's output and the batch. None: the module returns the loss, or an
            object with `loss`. The loss of a mesh is the mean over its data-parallel ranks.
        reduce_gradients: called after backward with the module and the mesh; averages gradients over data-parallel
            ranks. None: the module does so (DistributedDataParallel).
        lr: learning rate of the updates.
        seed: seed of torch before build_model.
        tolerance: largest error of a gradient relative to its largest value.
        run: function that runs the ranks of a mesh (tests plant faults there). The one process always runs by
            run_module_on_ranks.

    Returns:
        The result, which is true if all tensors are the same. Its .table() is a printable table, its .first_difference
        the first tensor that differs. A difference, or an error of a rank, raises nothing.

    Raises:
        InputError: sizes, functions or a batch that ranks cannot take; one process fails; a launcher's ranks call this.

    Communication: starts gloo ranks of its own on this machine, and waits for them.
    """
    check_starts_own_ranks("fm.verify")
    sizes = _checked_sizes(mesh_sizes)
    spec = ModuleRun(
        FunctionOfFile.of("build_model", build_model),
        batch,
        loss_fn and FunctionOfFile.of("loss_fn", loss_fn),
        reduce_gradients and FunctionOfFile.of("reduce_gradients", reduce_gradients),
        lr,
        seed,
    )
    try:
        check_sent_to_ranks(spec)
    except Exception as error:
        raise InputError(f"batch or functions cannot be sent to the ranks: {error}") from error
    started = time.monotonic()
    try:
        one = run_module_on_ranks(spec)[0]
    except RankError as error:
        raise InputError(f"build_model(None) on one process: {describe_error(error)}") from error

    def tried(axes: Sequence[str]) -> tuple[Comparison | None, str | None]:
        try:
            records = run(replace(spec, sizes={_SIZES[axis]: sizes[axis] for axis in axes}))
        except RankError as error:
            return None, describe_error(error)
        reference = Reference(_comparable(one, records), lr, hints=(OUTPUT,), tolerance=tolerance)
        return compare(reference, records), None

    def differs(parts: Sequence[str]) -> bool:
        found, raised = tried([names[part] for part in parts])
        return raised is not None or found is None or found.first is not None

    names = {AXES.get(axis, axis): axis for axis in sizes}
    comparison, raised_error = tried(tuple(sizes))
    wrong = raised_error is not None or comparison is None or comparison.first is not None
    cause = find_cause(tuple(names), differs) if wrong else None
    layout = _result(sizes, comparison, raised_error, cause, time.monotonic() - started)
    subject = getattr(build_model, "__qualname__", type(build_model).__name__)
    return Verification(subject, f"float32, {NUM_UPDATES} updates", (layout,))


def _result(
    sizes: Mapping[str, int], comparison: Comparison | None, error: str | None, cause: Cause | None, seconds: float
) -> LayoutResult:
    """Return the result. Outputs of submodules may differ (some are partial sums); they only locate a wrong loss."""
    first = None if comparison is None else comparison.first
    hint = None
    if comparison is not None and first is not None and (first.kind, first.step) == (LOSS, 1):
        count = sum(row.num_tensors for row in comparison.rows if row.kind == OUTPUT)
        hint = f"that of no submodule ({count} compared): what is between or behind them is wrong"
        hint = hint if comparison.first_hint is None else comparison.first_hint.described
    rows = () if comparison is None else tuple(row for row in comparison.rows if row.kind != OUTPUT)
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    return LayoutResult(shown, math.prod(sizes.values()), rows, first, error, cause, hint, seconds)


def _checked_sizes(mesh_sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of axes longer than 1, by short name."""
    short = {full: name for name, full in _SIZES.items()}
    sizes: dict[str, int] = {}
    for name, size in mesh_sizes.items():
        axis = short.get(name, name)
        check(axis in _SIZES, f"mesh_sizes={dict(mesh_sizes)}: {name!r} must be one of {', '.join(_SIZES)}")
        check(isinstance(size, int) and size >= 1, f"mesh_sizes[{name!r}]={size!r} must be a whole number of 1 or more")
        sizes[axis] = size
    check(
        sizes.get("pp", 1) == 1,
        f"mesh_sizes={dict(mesh_sizes)}: pp must be 1: a module is whole on every rank (fused-megatron verify CONFIG "
        "tries the pipelines of fused_megatron.models)",
    )
    sizes = {axis: size for axis, size in sizes.items() if size > 1}
    ranks = math.prod(sizes.values())
    check(1 < ranks <= MOST_RANKS, f"mesh_sizes={dict(mesh_sizes)} is {ranks} ranks: 2 to {MOST_RANKS} wanted")
    return sizes


def _comparable(one: RankRecord, ranks: Sequence[RankRecord]) -> RankRecord:
    """Return the record of one process without outputs whose shapes differ on the ranks (shards, replaced modules)."""
    kept = RankRecord(one.coordinates)
    for key, pieces in one.pieces.items():
        if key.kind == OUTPUT:
            stops = [stop for _, stop in pieces[0].place]
            found = [piece for record in ranks for piece in record.pieces.get(key, [])]
            whole = all(len(piece.place) == len(stops) for piece in found)
            largest = [max(dim) for dim in zip(*([s for _, s in p.place] for p in found), strict=True)] if whole else []
            if largest != stops or any(key not in record.pieces for record in ranks):
                continue
        kept.pieces[key] = pieces
    return kept
