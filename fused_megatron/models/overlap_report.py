"""Report of what hides under the products of a pipeline stage: for each kind of layer in how many chunks, and the rest.

The layers choose by the same functions in their first step; a report asks before it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from fused_megatron.collectives import Group, group_size
from fused_megatron.collectives.transport.select import is_shared
from fused_megatron.config import TrainConfig
from fused_megatron.expert_parallel import ExpertMLP
from fused_megatron.models.parallel_mlp import ParallelMLP
from fused_megatron.overlap import ChunkChoice, chunk_choice
from fused_megatron.overlap.chunks import chunk_edges, tile_steps
from fused_megatron.overlap.group_costs import seconds_of, slowest
from fused_megatron.overlap.overlapped_linear import gather_product_of, reduced_product_of
from fused_megatron.overlap.timed_ways import BY_SYMMETRIC_MEMORY, Chosen, random_values
from fused_megatron.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    column_parallel_linear,
    parallel_mlp,
    row_parallel_linear,
)
from fused_megatron.tensor_parallel.mlp import prefers_layers

_MEASURED_CALLS = 5
# An overlap below this share of the products is not missed.
_LEAST_SHARE = 0.03


class LayerOverlap(NamedTuple):
    """How the products of a kind of layer run beside their collectives.

    Attributes:
        layer: name in a block, or in the model: "attention.projection".
        asked: the setting `overlap` of the layer.
        on_cpu: whether the ranks are CPUs.
        shared_memory: whether each rank does its transfers itself, so that none runs beside a product.
        ways: the choices, by the direction whose collectives they hide; a direction without collectives has none. Times
            are nan where a number of chunks is asked, since nothing is measured then.
        measured_s: seconds that the collectives add to forward and backward; None if that was not asked.
    """

    layer: str
    asked: bool | int
    on_cpu: bool
    shared_memory: bool
    ways: Mapping[str, Chosen]
    measured_s: float | None = None

    @property
    def text(self) -> str:
        """One line: what runs in which way, and the milliseconds that stay exposed."""
        parts = [f"{direction} {_text(chosen)}" for direction, chosen in self.ways.items()]
        if self.measured_s is not None:
            parts.append(f"measured {1e3 * self.measured_s:.3g} ms exposed")
        return f"{self.layer}: {'; '.join(parts)}"

    @property
    def wants_chunks(self) -> bool:
        """Whether the setting asks for chunks: True, or a number above 1."""
        return self.asked is True or self.asked > 1

    @property
    def warning(self) -> str | None:
        """What was asked and does not happen; None if all does."""
        chosen = self.ways.values()
        if not self.wants_chunks or any(each.num_chunks != 1 for each in chosen):
            return None
        if self.asked is not True:
            return (
                f"parallel.overlap={self.asked}, but {self.layer} runs whole: it has too few rows "
                "(raise training.microbatch_size or model.seq_len)"
            )
        exposed_s, product_s = sum(each.exposed_s for each in chosen), sum(each.product_s for each in chosen)
        if self.on_cpu or exposed_s < _LEAST_SHARE * product_s:
            return None
        return (
            f"parallel.overlap=True hides nothing in {self.layer}: {1e3 * exposed_s:.3g} ms of its collectives stay "
            "exposed (larger microbatches, fewer tensor-parallel ranks, or a faster link between them)"
        )


def stage_overlap(stages: Mapping[int, nn.Module], config: TrainConfig, measures: bool = False) -> list[LayerOverlap]:
    """Return a row for each kind of layer of a rank's stages that has collectives beside products.

    All ranks of a tensor-parallel group call it together.

    Args:
        stages: this rank's stages.
        config: the sizes of a microbatch.
        measures: whether each kind but experts is also timed, forward and backward, with its collectives and without.

    Communication: none on a CPU, where groups are measured when layers are made; on a GPU as timed_ways, once for
        each shape. With measures 6 forwards and backwards of each kind, and one all-reduce of 16 bytes.
    Memory: with measures the operands, gradients and results of one layer.
    """
    shape = config.most_positions, config.training.microbatch_size
    found: dict[tuple[str, torch.Size], LayerOverlap] = {}
    with torch.no_grad():
        for stage in stages.values():
            for name, layer in _layers(stage):
                key = name, next(layer.parameters()).shape
                if key not in found:
                    found[key] = _row(name, layer, shape, config, measures)
    return [row for row in found.values() if row.ways]


def overlap_lines(rows: Sequence[LayerOverlap]) -> list[str]:
    """Return the lines that a run prints: a head, a line for each kind of layer, warnings."""
    if not rows:
        return []
    asked = "by the cost model" if rows[0].asked is True else f"{rows[0].asked} chunks"
    asked = asked if rows[0].wants_chunks else "off"
    why = "; each rank does its transfers itself, through shared memory: nothing can hide" * rows[0].shared_memory
    warnings = [f"warning: {row.warning}" for row in rows if row.warning is not None]
    return [
        f"overlap of products and collectives: {asked}{why}",
        *(f"  {row.text}" for row in rows),
        *warnings,
    ]


def _text(chosen: Chosen) -> str:
    if math.isnan(chosen.exposed_s):
        return chosen.means
    source = "timed" if chosen.is_timed else "predicted"
    exposed, whole = 1e3 * max(0.0, chosen.exposed_s), 1e3 * chosen.transfer_s
    return f"{chosen.means}, {exposed:.3g} of {whole:.3g} ms exposed ({source})"


def _layers(stage: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers with products beside collectives, by their names without the number of a block."""
    inside: set[nn.Module] = set()
    for name, module in stage.named_modules():
        if module in inside or not isinstance(
            module, ParallelMLP | ExpertMLP | ColumnParallelLinear | RowParallelLinear
        ):
            continue
        inside.update(module.modules())
        first, _, rest = name.partition(".")
        yield rest.partition(".")[2] if first == "blocks" else name, module


def _row(name: str, layer: nn.Module, shape: tuple[int, int], config: TrainConfig, measures: bool) -> LayerOverlap:
    core = layer.expansion if isinstance(layer, ParallelMLP) else layer
    assert isinstance(core, ExpertMLP | ColumnParallelLinear | RowParallelLinear)
    choice, weight = chunk_choice(core.overlap), next(layer.parameters())
    group = core.ep_group if isinstance(core, ExpertMLP) else core.tp_group
    ways: dict[str, Chosen] = {}
    measured_s = None
    if isinstance(layer, ExpertMLP):
        ways = _of_experts(layer, choice, shape, config)
    elif group_size(group) > 1:
        assert not isinstance(core, ExpertMLP)
        dim = 0 if core.sequence_parallel else None
        if isinstance(layer, ParallelMLP):
            ways = _of_mlp(layer, choice, shape, dim)
        else:
            ways = _of_linear(core, choice, shape, dim)
        if measures:
            measured_s = _measured_s(layer, shape, dim)
    shared = group is not None and is_shared(group, weight)
    return LayerOverlap(name, core.overlap, weight.device.type == "cpu", shared, ways, measured_s)


def _like(weight: torch.Tensor, *shape: int) -> torch.Tensor:
    """Return a tensor of this shape that takes no memory: a choice reads no values."""
    return torch.empty(1, dtype=weight.dtype, device=weight.device).expand(shape)


def _of_linear(
    layer: ColumnParallelLinear | RowParallelLinear, choice: ChunkChoice, shape: tuple[int, int], dim: int | None
) -> dict[str, Chosen]:
    """Return the choices of ColumnLinearFunction or RowLinearFunction."""
    group, weight, (rows, batch) = layer.tp_group, layer.weight, shape
    own = rows // group_size(group)
    outputs, inputs = weight.shape
    # A sum is cut along all rows of an all-reduce, or a rank's positions of a reduce-scatter.
    of_sum = (rows * batch, 1) if dim is None else (own, batch)
    is_column = isinstance(layer, ColumnParallelLinear)
    if is_column:
        summed, gathered = _like(weight, rows, batch, outputs), _like(weight, own, batch, inputs)
        sums = choice.decide_reduction(summed, weight.t(), dim, group, 2, reduced_product_of)
    else:
        summed, gathered = _like(weight, rows, batch, inputs), _like(weight, own, batch, outputs)
        sums = choice.decide_reduction(summed, weight, dim, group, run=reduced_product_of)
    found = {"backward" if is_column else "forward": _or_asked(sums, choice, summed, *of_sum)}
    if dim is not None:
        of_gather = weight if is_column else weight.t()
        gathers = choice.decide_gather(gathered, of_gather, dim, group, gather_product_of)
        found["forward" if is_column else "backward"] = _or_asked(gathers, choice, gathered, own, batch)
    return dict(sorted(found.items(), reverse=True))


def _of_mlp(layer: ParallelMLP, choice: ChunkChoice, shape: tuple[int, int], dim: int | None) -> dict[str, Chosen]:
    """Return the choices of parallel_mlp: in chunks of rows, or the sums of both layers."""
    expansion, projection = layer.expansion.weight, layer.projection.weight
    group, (rows, batch) = layer.expansion.tp_group, shape
    ranks = group_size(group) if dim is not None else 1
    x = _like(expansion, rows // ranks, batch, expansion.shape[1])
    if prefers_layers(x, expansion, projection, layer.activation, dim, group, choice):
        up, down = (_of_linear(each, choice, shape, dim) for each in (layer.expansion, layer.projection))
        names = [name for name in ("forward", "backward") if name in up or name in down]
        return {name: _sum([each[name] for each in (up, down) if name in each]) for name in names}
    both = choice.decide_mlp(x, ranks, expansion.numel() + projection.numel(), group) or (None, None)
    found = [_or_asked(each, choice, x, rows // ranks * batch, 1) for each in both]
    return dict(zip(("forward", "backward"), found, strict=True))


def _sum(several: Sequence[Chosen]) -> Chosen:
    """Return the choices of several products as one, with the way of a product that is not whole."""
    number = next((each.num_chunks for each in several if each.num_chunks != 1), 1)
    products, transfers, exposed = zip(*(each[1:4] for each in several), strict=True)
    return Chosen(number, sum(products), sum(transfers), sum(exposed), all(each.is_timed for each in several))


def _of_experts(
    layer: ExpertMLP, choice: ChunkChoice, shape: tuple[int, int], config: TrainConfig
) -> dict[str, Chosen]:
    """Return the choice of a dispatch by all-to-all with even routes, which forward and backward share."""
    num_rows = -(-prod(shape) // config.parallel.tensor_parallel_size) * config.model.experts_per_token
    if group_size(layer.ep_group) == 1 or layer.dispatch == "all_gather":
        return {}
    elements = (layer.expansion_weight.numel() + layer.projection_weight.numel()) // layer.num_local_experts
    x = _like(layer.expansion_weight, num_rows, layer.hidden_size)
    chosen = _or_asked(choice.decide_exchange(x, num_rows, elements, layer.ep_group), choice, x, num_rows, 1)
    return {"forward and backward": chosen._replace(num_chunks=min(chosen.num_chunks, layer.num_local_experts))}


def _or_asked(chosen: Chosen | None, choice: ChunkChoice, x: torch.Tensor, length: int, rows_per_step: int) -> Chosen:
    """Return a choice, or the number that is asked; no more chunks than a dim of this length gives."""
    if chosen is None:
        chosen = Chosen(choice.fixed or 1, math.nan, math.nan, math.nan)
    if chosen.num_chunks == BY_SYMMETRIC_MEMORY:
        return chosen
    edges = chunk_edges(length, chosen.num_chunks, tile_steps(x, rows_per_step))
    return chosen._replace(num_chunks=len(edges))


def _measured_s(layer: nn.Module, shape: tuple[int, int], dim: int | None) -> float:
    """Time forward and backward of a layer with its collectives and without; return what they add."""
    core = layer.expansion if isinstance(layer, ParallelMLP) else layer
    assert isinstance(core, ColumnParallelLinear | RowParallelLinear)
    group, ranks, (rows, batch) = core.tp_group, group_size(core.tp_group), shape
    device, dtype = core.weight.device, core.weight.dtype
    shapes = [core.weight.shape, *([layer.projection.weight.shape] if isinstance(layer, ParallelMLP) else [])]
    weights = [random_values(each, dtype, device).requires_grad_() for each in shapes]
    is_column = isinstance(core, ColumnParallelLinear)

    def step(tp_group: Group) -> Callable[[torch.Tensor], None]:
        run: Callable[..., Any]
        if isinstance(layer, ParallelMLP):
            run = partial(parallel_mlp, expansion_bias=None, projection_bias=None, activation=layer.activation)
        else:
            run = partial(column_parallel_linear if is_column else row_parallel_linear, bias=None)
        names = ("expansion_weight", "projection_weight") if isinstance(layer, ParallelMLP) else ("weight",)
        run = partial(run, **dict(zip(names, weights, strict=True)), tp_group=tp_group)

        def forward_and_backward(x: torch.Tensor) -> None:
            y = run(x, sequence_parallel=dim is not None, overlap=core.overlap)
            torch.autograd.grad(y, [x, *weights], torch.ones_like(y))

        return forward_and_backward

    seconds = []
    for tp_group in (group, None):
        own = rows // ranks if dim is not None and is_column and tp_group is not None else rows
        x = random_values((own, batch, core.weight.shape[1]), dtype, device).requires_grad_()
        with torch.enable_grad():
            seconds.append(seconds_of(step(tp_group), x, _MEASURED_CALLS))
    assert group is not None
    with_s, without_s = slowest(seconds, group, device)
    return max(0.0, with_s - without_s)
