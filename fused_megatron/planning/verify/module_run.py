"""Three recorded updates of a user's module on this rank."""

import inspect
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fused_megatron.checks import check
from fused_megatron.collectives.together import sum_over_ranks_
from fused_megatron.interop.full_state import is_transposed
from fused_megatron.mesh import Mesh, coordinates, init_mesh
from fused_megatron.planning.verify.layout_run import NUM_UPDATES, move_vectors_
from fused_megatron.planning.verify.records import (
    GRADIENT,
    LOSS,
    NORM,
    OUTPUT,
    START,
    WEIGHT,
    Key,
    Piece,
    RankRecord,
    as_array,
)
from fused_megatron.planning.verify.reduced_config import CLIP_NORM, EPS
from fused_megatron.sharding import clip_grad_norm_, mark_all_shards
from fused_megatron.testing.rank_host import load_module


@dataclass(frozen=True)
class FunctionOfFile:
    """A function that ranks load from its file, because they cannot import functions of a script or a test.

    Attributes:
        module_name, path, qualified_name: module, file and qualified name of the function.
    """

    module_name: str
    path: str
    qualified_name: str

    @classmethod
    def of(cls, name: str, function: Callable[..., Any]) -> "FunctionOfFile | Callable[..., Any]":
        """Return a function in a form that ranks can load; return any other callable unchanged.

        Raises:
            InputError: a lambda, a function inside another function, or a function that is in no file.
        """
        if not inspect.isfunction(function):
            check(callable(function), f"{name}={function!r:.60} must be a function")
            return function
        shown = function.__qualname__
        check(
            "<" not in shown and os.path.exists(function.__code__.co_filename),
            f"{name}={shown} must be a function at the top level of a file: the ranks load it from there",
        )
        return cls(function.__module__, os.path.abspath(function.__code__.co_filename), shown)

    def load(self) -> Callable[..., Any]:
        """Return the function, loaded into this process."""
        found: Any = load_module(self.module_name, self.path)
        for name in self.qualified_name.split("."):
            found = getattr(found, name)
        function: Callable[..., Any] = found
        return function


@dataclass(frozen=True)
class ModuleRun:
    """Inputs of every rank's training.

    Attributes:
        build_model, batch, loss_fn, reduce_gradients, lr, seed: as the arguments of verify.
        sizes: size of each mesh axis, by its name in init_mesh; None: one process without a mesh.
    """

    build_model: Any
    batch: Any
    loss_fn: Any
    reduce_gradients: Any
    lr: float
    seed: int
    sizes: Mapping[str, int] | None = None

    @property
    def num_ranks(self) -> int:
        return math.prod((self.sizes or {}).values())


def run_module(rank: int, world_size: int, run: ModuleRun) -> RankRecord:
    """Train a module for NUM_UPDATES steps and return every tensor. run_on_ranks calls it on every rank.

    Raises:
        InputError: build_model or loss_fn returned a wrong type.
        Other errors of the user's functions.
    """
    torch.manual_seed(run.seed)
    mesh = None if run.sizes is None else init_mesh(**run.sizes, device_type="cpu")
    build_model, loss_fn, reduce_gradients = (
        each.load() if isinstance(each, FunctionOfFile) else each
        for each in (run.build_model, run.loss_fn, run.reduce_gradients)
    )
    model = build_model(mesh)
    check(isinstance(model, nn.Module), f"build_model returned {type(model).__name__}: a torch.nn.Module is wanted")
    model = model.float().eval()
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    mark_all_shards(bare)
    parameters = {name: p for name, p in bare.named_parameters() if p.requires_grad}
    check(all(type(p) is nn.Parameter for p in parameters.values()), "parameters must be plain ones, no DTensor")
    move_vectors_(parameters)
    transposed = {name: is_transposed(bare).get(p, False) for name, p in parameters.items()}
    at = {} if mesh is None else coordinates(mesh.rank, {axis: n for axis, n in mesh.sizes.items() if n > 1})
    record = RankRecord(at)

    def note(kind: str, step: int, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            record.add_parameter(Key(kind, step, name), parameters[name], value, transposed[name])

    note(START, 0, parameters)
    optimizer = torch.optim.AdamW(parameters.values(), lr=run.lr, eps=EPS, weight_decay=0.1)
    batch, first_row = _own_rows(run.batch, mesh)
    hooks = _output_hooks(bare, record, first_row)
    for step in range(1, NUM_UPDATES + 1):
        optimizer.zero_grad()
        loss = _loss(model, batch, loss_fn)
        for hook in hooks:
            hook.remove()
        loss.backward()
        if reduce_gradients is not None and mesh is not None:
            reduce_gradients(model, mesh)
        record.add_number(Key(LOSS, step), _mean_over_replicas(loss.detach().double(), mesh))
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in reversed(parameters.items())}
        note(GRADIENT, step, gradients)
        record.add_number(Key(NORM, step), float(clip_grad_norm_(bare, CLIP_NORM)))
        optimizer.step()
        note(WEIGHT, step, parameters)
    return record


def _own_rows(batch: Any, mesh: Mesh | None) -> tuple[Any, int]:
    """Return this data-parallel rank's rows of every tensor, and the index of the first row."""
    ranks, rank = (1, 0) if mesh is None else (mesh.dp_size, mesh.dp_rank)

    def own(value: Any) -> Any:
        if ranks == 1 or not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        check(
            value.shape[0] % ranks == 0,
            f"batch: {value.shape[0]} rows of a tensor must be divisible by data_parallel_size={ranks}",
        )
        return value.chunk(ranks)[rank]

    first = next((v for v in _tensors(batch) if v.dim() > 0), None)
    start = 0 if first is None else rank * (first.shape[0] // ranks)
    if isinstance(batch, Mapping):
        return {name: own(value) for name, value in batch.items()}, start
    return (own(batch) if isinstance(batch, torch.Tensor) else tuple(own(value) for value in batch)), start


def _tensors(batch: Any) -> list[torch.Tensor]:
    values = [batch] if isinstance(batch, torch.Tensor) else batch.values() if isinstance(batch, Mapping) else batch
    return [value for value in values if isinstance(value, torch.Tensor)]


def _loss(model: nn.Module, batch: Any, loss_fn: Any) -> torch.Tensor:
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(batch) if isinstance(batch, torch.Tensor) else model(*batch)
    loss = getattr(output, "loss", output) if loss_fn is None else loss_fn(output, batch)
    shown = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
    check(
        isinstance(loss, torch.Tensor) and loss.numel() == 1,
        f"the loss is {shown}: a scalar is wanted, returned by the module (or its `loss`), or by loss_fn",
    )
    scalar: torch.Tensor = loss.reshape(())
    return scalar


def _mean_over_replicas(loss: torch.Tensor, mesh: Mesh | None) -> float:
    if mesh is None or mesh.dp_size == 1:
        return float(loss)
    total = loss.reshape(1).clone()
    sum_over_ranks_(total, mesh.dp_group)
    return float(total) / mesh.dp_size


def _output_hooks(model: nn.Module, record: RankRecord, first_row: int) -> list[Any]:
    """Register hooks that record the first output of every submodule; its dim 0 counts as the rows of the batch."""

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        y, key = output[0] if isinstance(output, tuple) and output else output, Key(OUTPUT, 1, name)
        if isinstance(y, torch.Tensor) and y.is_floating_point() and y.dim() and key not in record.pieces:
            place = ((first_row, first_row + y.shape[0]), *((0, size) for size in y.shape[1:]))
            record.add(key, Piece(as_array(y), place))

    return [module.register_forward_hook(partial(keep, name)) for name, module in model.named_modules() if name]
