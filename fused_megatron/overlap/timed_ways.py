"""Ways to run a product with its collective, timed at the shape of a layer: whole, in chunks, by torch's fused op.

A model of chunks says nothing about torch's fused products over symmetric memory, in which the copy engine moves blocks
and no multiprocessor waits. So all ways are timed once, on all ranks of the group; the slowest rank counts.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from fused_megatron.checks import first_line
from fused_megatron.collectives.groups import Group
from fused_megatron.collectives.transfers import Transfer
from fused_megatron.overlap.group_costs import refuse_capture, seconds_of, slowest

_LOG = logging.getLogger(__name__)
BY_SYMMETRIC_MEMORY = 0
"""Stands for torch's fused op in place of a number of chunks; see symmetric_memory."""
_TIMED_CALLS = 5
Run = Callable[[torch.Tensor, torch.Tensor, int | None, Group, int], object]
"""Product of x and weight with a collective over dim (None: an all-reduce), in chunks or by symmetric memory."""


class RunMLP(Protocol):
    """Forward of an MLP on a sequence shard x: layer by layer, or in chunks of rows."""

    def __call__(
        self, x: torch.Tensor, expansion: torch.Tensor, projection: torch.Tensor, tp_group: Group, by_layers: bool
    ) -> object:
        """Run it."""

    def __hash__(self) -> int:
        """Return the same number for the same object: the result is looked up by it."""


class Chosen(NamedTuple):
    """How a product and its collective run, and the seconds behind the choice.

    Attributes:
        num_chunks: number of chunks, or BY_SYMMETRIC_MEMORY.
        product_s: time of the products, without collectives: timed where is_timed, else predicted.
        transfer_s: predicted time of the collectives in one piece, without products.
        exposed_s: time that the collectives add to the products: timed where is_timed, else predicted.
        is_timed: whether the ways to run it were timed at this shape.
    """

    num_chunks: int
    product_s: float
    transfer_s: float
    exposed_s: float
    is_timed: bool = False

    @property
    def means(self) -> str:
        """Text on how it runs."""
        return means_text(self.num_chunks)


def means_text(num_chunks: int) -> str:
    """Return the text on a number of chunks, or on BY_SYMMETRIC_MEMORY."""
    return {BY_SYMMETRIC_MEMORY: "by symmetric memory", 1: "whole"}.get(num_chunks, f"in {num_chunks} chunks")


class Operands(NamedTuple):
    """Shapes of a product: of x, of the weight (contiguous or transposed), and of x as the whole product has it.

    followed: whether a product of the same size follows, under which a pending collective may run.
    """

    x: tuple[int, ...]
    weight: tuple[int, ...]
    is_contiguous: bool
    whole_x: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    followed: bool = False


@functools.lru_cache(maxsize=1024)
def fastest(
    run: Run, operands: Operands, dim: int | None, group: dist.ProcessGroup, chosen: Chosen, with_fused: bool
) -> Chosen:
    """Time the whole product, the chunks that the cost model chose, and torch's fused op, on all ranks at once.

    Args:
        run: runs the product in one of the ways.
        operands: shapes of the operands; their values are random.
        dim: the dim over which the collective gathers or scatters; None for an all-reduce.
        group: the ranks.
        chosen: the choice of the cost model.
        with_fused: whether torch has a fused op for it.

    Communication: each way 6 times, and one all-reduce of 8 bytes for each.
    Memory: operands and result of the product.
    """
    ways = [*sorted({1, chosen.num_chunks}), *([BY_SYMMETRIC_MEMORY] if with_fused else [])]
    if len(ways) == 1:
        return chosen
    refuse_capture(operands.device)
    values = functools.partial(random_values, dtype=operands.dtype, device=operands.device)
    x, weight = values(operands.x), values(operands.weight if operands.is_contiguous else operands.weight[::-1])
    weight = weight if operands.is_contiguous else weight.t()
    whole_x = values(operands.whole_x)

    def multiply(_: torch.Tensor) -> None:
        run(whole_x, weight, dim, None, 1)

    followed_by = multiply if operands.followed else None

    def time(way: int) -> float:
        try:
            return _way_s(lambda x: run(x, weight, dim, group, way), x, followed_by)
        except RuntimeError as error:
            if way != BY_SYMMETRIC_MEMORY:
                raise
            _LOG.warning("torch's fused op refuses %s, and is not used: %s", operands.x, first_line(error))
            return math.inf  # torch checks shapes, so that it refuses on every rank

    with torch.no_grad():
        seconds = list(map(time, ways))
        product_s = (1 + operands.followed) * _way_s(multiply, x)
    product_s, *seconds = slowest([product_s, *seconds], group, operands.device)
    best = min(range(len(ways)), key=seconds.__getitem__)
    shown = ", ".join(f"{means_text(way)} {1e3 * each:.3g} ms" for way, each in zip(ways, seconds, strict=True))
    _LOG.info("overlap over %d ranks: %s timed: %s", group.size(), operands.x, shown)
    return Chosen(ways[best], product_s, chosen.transfer_s, seconds[best] - product_s, is_timed=True)


@functools.lru_cache(maxsize=1024)
def layers_are_faster(
    run: RunMLP,
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup,
) -> bool:
    """Time the forward of an MLP layer by layer and in chunks of rows, on all ranks at once.

    Communication: of 6 forwards in both ways, and one all-reduce of 16 bytes.
    """
    refuse_capture(device)
    x, up, down = (random_values(shape, dtype, device) for shape in shapes)
    with torch.no_grad():
        seconds = [
            _way_s(functools.partial(run, expansion=up, projection=down, tp_group=group, by_layers=flag), x)
            for flag in (False, True)
        ]
    in_chunks_s, by_layers_s = slowest(seconds, group, device)
    _LOG.info(
        "overlap over %d ranks: an MLP of %s timed: in chunks of rows %.3g ms, layer by layer %.3g ms",
        group.size(),
        shapes[0],
        1e3 * in_chunks_s,
        1e3 * by_layers_s,
    )
    return by_layers_s < in_chunks_s


def _way_s(
    work: Callable[..., object], x: torch.Tensor, followed_by: Callable[[torch.Tensor], None] | None = None
) -> float:
    def whole(x: torch.Tensor) -> None:
        left = work(x)
        if followed_by is not None:
            followed_by(x)
        if isinstance(left, Transfer):
            left.wait()

    return seconds_of(whole, x, repeats=_TIMED_CALLS)


def random_values(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor of random values, which leaves the generators of the run as they are."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
