"""Linear layers sharded over tensor-parallel ranks, by output features (column) or by input features (row)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from typing_extensions import Self

from fused_megatron.checks import InputError, check, check_divisible, check_shape, dtype_name
from fused_megatron.collectives import (
    Group,
    all_gather_split,
    group_rank,
    group_size,
    meet,
    on_ranks,
    split_all_gather,
)
from fused_megatron.mesh import ParallelLayout
from fused_megatron.ops.autograd_function import is_differentiated
from fused_megatron.ops.product import product
from fused_megatron.overlap import ColumnLinearFunction, RowLinearFunction, chunk_choice
from fused_megatron.overlap.overlapped_linear import autocast_operands
from fused_megatron.sharding import (
    ParameterShard,
    ShardedModule,
    ShardPart,
    copy_shard_,
    fill_normal_shard_,
    used_by_parts,
)


def column_parallel_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tp_group: Group,
    sequence_parallel: bool = False,
    sequence_dim: int = 0,
    overlap: bool | int = True,
) -> torch.Tensor:
    """Compute x @ weight.T + bias, with weight and bias sharded over output features (also for a tied head).

    Equals torch.nn.functional.linear on one rank. All shapes and their duals: see overlap.ColumnLinearFunction.

        x           [S, B, H], or this rank's [S / R, B, H] under sequence parallelism
        forward     y_shard_o [S, B, O / R] = x @ w_shard_o.T + b_shard_o
        backward    dx = sum over ranks of dy_shard_o @ w_shard_o (under sequence parallelism: this rank's block of it)

    Args:
        x: [..., H] float; replicated, or under sequence parallelism this rank's block of sequence_dim.
        weight: [O / R, H], dtype of x (under autocast all three are cast, as torch does).
        bias: [O / R] or None.
        tp_group: the R ranks; None for this rank only.
        sequence_parallel: x is a sequence shard; y has the whole sequence.
        sequence_dim: the dim of x that is the sequence; not the last.
        overlap: number of chunks of the product, so that products and collectives run side by side. True lets the cost
            model of the group choose (overlap.chunk_choice; all ranks measure at the first call), a number fixes it,
            False is 1.

    Returns:
        [..., O / R], dtype of x, contiguous.

    Raises:
        InputError: shapes that do not fit, this rank not in tp_group.
        TypeError: dtypes that differ.

    Communication: none forward; one all-reduce of x backward, under the product for dw. Under sequence parallelism
        one all-gather of x forward; backward one all-gather and one reduce-scatter, each under a product.
    Memory: x (under sequence parallelism the shard) and weight are saved.

    Paper: Shoeybi et al. 2019 (arXiv:1909.08053); Korthikanti et al. 2022 (arXiv:2205.05198).
    """
    group_size(tp_group)
    x, weight, bias = autocast_operands(x, weight, bias)
    check_operands(x, weight, bias)
    if is_plain_product(tp_group):
        return product(x, weight, bias)
    dim = sharded_sequence_dim(x, sequence_parallel, sequence_dim, tp_group)
    return on_ranks(ColumnLinearFunction, tp_group)(x, weight, bias, dim, tp_group, chunk_choice(overlap))


def row_parallel_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tp_group: Group,
    sequence_parallel: bool = False,
    sequence_dim: int = 0,
    overlap: bool | int = True,
) -> torch.Tensor:
    """Compute x @ weight.T + bias, with x and weight sharded over input features, and bias replicated.

    Equals torch.nn.functional.linear on one rank. All shapes and their duals: see overlap.RowLinearFunction.

        x_shard_i   [S, B, I / R]
        forward     y = sum over ranks of x_shard_i @ w_shard_i.T, + bias; [S, B, O], or this rank's [S / R, B, O]
        backward    dx_shard_i [S, B, I / R] = dy @ w_shard_i

    Args:
        x: [..., I / R] float; this rank's block of the last dim.
        weight: [O, I / R], dtype of x (under autocast all three are cast, as torch does).
        bias: [O] or None; the same on every rank.
        tp_group: the R ranks; None for this rank only.
        sequence_parallel: y is this rank's block of sequence_dim.
        sequence_dim: the dim of x that is the sequence; not the last.
        overlap: number of chunks of the product, so that products and collectives run side by side. True lets the cost
            model of the group choose (overlap.chunk_choice; all ranks measure at the first call), a number fixes it,
            False is 1.

    Returns:
        [..., O] bitwise the same on every rank, or its block; dtype of x, contiguous.

    Raises:
        InputError: shapes that do not fit, a sequence that R does not divide, this rank not in tp_group.
        TypeError: dtypes that differ.

    Communication: one all-reduce of y forward, none backward; under sequence parallelism one reduce-scatter forward,
        one all-gather backward. Every rank computes the full gradient of bias, without a collective.
    Memory: x and weight are saved.

    Paper: Shoeybi et al. 2019 (arXiv:1909.08053); Korthikanti et al. 2022 (arXiv:2205.05198).
    """
    ranks = group_size(tp_group)
    x, weight, bias = autocast_operands(x, weight, bias)
    check_operands(x, weight, bias)
    if is_plain_product(tp_group):
        return product(x, weight, bias)
    dim = sharded_sequence_dim(x, sequence_parallel, sequence_dim, tp_group)
    if dim is not None:
        check_divisible(f"sequence length x.shape[{dim}]", x.shape[dim], "tensor_parallel_size", ranks)
    return on_ranks(RowLinearFunction, tp_group)(x, weight, bias, dim, tp_group, chunk_choice(overlap))


def is_plain_product(tp_group: Group) -> bool:
    """Whether a layer is only its product: one rank, and no gradient. A token of a text then costs half the time."""
    return group_size(tp_group) == 1 and not is_differentiated()


def check_operands(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise unless the operands fit torch.nn.functional.linear. Runs in every forward: texts are built on failure."""
    if weight.dim() != 2:
        raise InputError(f"weight.shape={tuple(weight.shape)} must be (out_features, in_features)")
    features = weight.shape[1]
    if x.dim() == 0 or x.shape[-1] != features:
        raise InputError(
            f"x.shape={tuple(x.shape)} must end in this rank's number of input features {features} "
            f"(weight.shape={tuple(weight.shape)})"
        )
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype != weight.dtype:
            raise TypeError(
                f"{name}.dtype={dtype_name(tensor.dtype)} must equal weight.dtype={dtype_name(weight.dtype)} "
                "(cast one of them, or use torch.autocast)"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias.shape={tuple(bias.shape)} must be {tuple(weight.shape[:1])}")
    if x.device != weight.device:
        raise InputError(f"x.device={x.device} must equal weight.device={weight.device}")


def sharded_sequence_dim(x: torch.Tensor, sequence_parallel: bool, sequence_dim: int, tp_group: Group) -> int | None:
    """Return the dim of x that is sharded, counted from 0; None without sequence parallelism."""
    if not sequence_parallel or group_size(tp_group) == 1:
        return None
    dims = x.dim()
    if not -dims <= sequence_dim < dims or sequence_dim % dims == dims - 1:
        raise InputError(f"sequence_dim={sequence_dim} must be a dim of x.shape={tuple(x.shape)} other than the last")
    return sequence_dim % dims


@dataclass(frozen=True)
class OutputPart:
    """Part of a layer's output features, with a full weight of its own.

    Attributes:
        name: name of the full weight, in checkpoints and for its initial values.
        features: number of features over all ranks, each counted once.
        copies: number of neighbouring ranks that hold the same features; above 1 if there are fewer features than
            ranks.
    """

    name: str
    features: int
    copies: int = 1


@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """Constructor options of column- and row-parallel layers, except sizes; see ColumnParallelLinear."""

    layout: ParallelLayout
    sequence_dim: int
    skip_bias_add: bool
    init_std: float
    device: torch.device | str | None
    dtype: torch.dtype | None


class _Shard(NamedTuple):
    """This rank's part of a layer [O, I]: the local shape of the weight, and the shards of weight and bias."""

    shape: tuple[int, int]
    weight: ParameterShard | tuple[ShardPart, ...]
    bias: ParameterShard | tuple[ShardPart, ...]


class _ParallelLinear(ShardedModule):
    """Base of column- and row-parallel linear layers: each rank has a part of the layer."""

    by_symmetric_memory = False
    bias: nn.Parameter | None
    weight: nn.Parameter

    def __init__(self, in_features: int, out_features: int, bias: bool, shard: _Shard, options: LinearOptions) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.tp_group = options.layout.tp_group
        self.sequence_parallel, self.sequence_dim = options.layout.sequence_parallel, options.sequence_dim
        self.overlap = options.layout.overlap
        self.skip_bias_add = options.skip_bias_add
        self.init_std = options.init_std
        self._measure_overlap(options.device, options.dtype)
        weight = torch.empty(shard.shape, device=options.device, dtype=options.dtype)
        self.register_shard("weight", nn.Parameter(weight), shard.weight)
        if bias:
            values = torch.empty(shard.shape[0], device=options.device, dtype=options.dtype)
            self.register_shard("bias", nn.Parameter(values), shard.bias)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, tp_group: Group, **options: Any) -> Self:
        """Make a layer with a copy of this rank's shard of a linear layer's weights; on one rank of all weights.

        Args:
            linear: the full layer, the same on every rank of tp_group.
            tp_group: the R ranks; None for this rank only.
            **options: further arguments of the layer (sequence_parallel, skip_bias_add, overlap, ..).

        Raises:
            InputError: as the constructor; if R does not divide a size, the message names the nearest that it divides.
            TypeError: linear is not a torch.nn.Linear.

        Communication: once for each group the measurement of overlap=True, and collectives.meet; else none.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear={type(linear).__name__} must be a torch.nn.Linear")
        weight, bias = linear.weight, linear.bias
        new: Any = cls  # the constructor of the base class takes other arguments
        # The initial values are replaced, so the caller's generator is left as it is.
        with torch.random.fork_rng(devices=[]):
            layer = new(
                linear.in_features,
                linear.out_features,
                bias is not None,
                tp_group=tp_group,
                device="meta",
                dtype=weight.dtype,
                **options,
            )
        layer._measure_overlap(weight.device, weight.dtype)
        layer.to_empty(device=weight.device)
        for shard, full in ((layer.weight, weight), (layer.bias, bias)):
            if shard is not None and full is not None:
                copy_shard_(shard, full.detach())
                shard.requires_grad_(full.requires_grad)
        return layer

    def _measure_overlap(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Let the ranks meet and measure their group now, since all ranks make the layer; not in the first forward."""
        like = torch.empty(0, device=device, dtype=dtype)
        if like.is_cpu:
            meet(self.tp_group)
        costs = chunk_choice(self.overlap).measured(self.tp_group, like)
        self.by_symmetric_memory = costs is not None and costs.symmetric_memory

    def reset_parameters(self, seed: int | None = None, name: str = "weight") -> None:
        """Draw the weight from (seed, name), or from torch's CPU generator; the bias becomes 0.

        Without a seed torch's CPU generator must have the same state on all ranks of tp_group (torch.manual_seed).
        """
        self.mark_shards()
        draw_normal_weight_(self.weight, self.init_std, seed, name)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """Return the text for print(model)."""
        fused = self.by_symmetric_memory and self.sequence_parallel
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"tensor_parallel_size={group_size(self.tp_group)}, sequence_parallel={self.sequence_parallel}, "
            f"overlap={chunk_choice(self.overlap)}{', by symmetric memory' if fused else ''}"
        )


class ColumnParallelLinear(_ParallelLinear):
    """torch.nn.Linear with the weight [O, I] sharded over its rows: this rank computes O / R output features.

    Args:
        in_features: I.
        out_features: O over all ranks; must be divisible by R. Or the parts of the output, each of which is sharded
            separately; see StackedColumnParallelLinear.
        bias: whether the layer has a bias, sharded as the output.
        tp_group: the R ranks; None for this rank only.
        sequence_parallel: the input is this rank's block [S / R, ...] of the sequence.
        sequence_dim: the dim of the input that is the sequence.
        gather_output: return all O features on every rank; all ranks must compute the same with them.
        skip_bias_add: leave the bias to a following fused op (ops.bias_gelu); forward returns (y, bias).
        overlap: as column_parallel_linear.
        init_std: standard deviation of the initial weight; the full weight is the same for every R.
        device, dtype: as torch.nn.Linear.

    Raises:
        InputError: O is not divisible by R, this rank is not in tp_group.

    Shapes, Communication, Memory: as column_parallel_linear; gather_output adds one all-gather of y forward.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[OutputPart],
        bias: bool = True,
        *,
        tp_group: Group,
        sequence_parallel: bool = False,
        sequence_dim: int = 0,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        overlap: bool | int = True,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check(
            not (gather_output and skip_bias_add),
            "gather_output=True with skip_bias_add=True would return all features with a shard of the bias "
            "(set one of them to False)",
        )
        options = LinearOptions(
            layout=ParallelLayout(tp_group, sequence_parallel, overlap),
            sequence_dim=sequence_dim,
            skip_bias_add=skip_bias_add,
            init_std=init_std,
            device=device,
            dtype=dtype,
        )
        parts = [OutputPart("", out_features)] if isinstance(out_features, int) else out_features
        shard = _column_shard(in_features, parts, tp_group)
        super().__init__(in_features, sum(part.features for part in parts), bias, shard, options)
        self.gather_output = gather_output

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Apply the layer to x [..., I]; returns y [..., O / R] ([..., O] with gather_output), or (y, bias)."""
        y = column_parallel_linear(
            x,
            self.weight,
            None if self.skip_bias_add else self.bias,
            tp_group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
            sequence_dim=self.sequence_dim,
            overlap=self.overlap,
        )
        if self.skip_bias_add:
            return y, self.bias
        return all_gather_split(y, -1, self.tp_group) if self.gather_output else y


class RowParallelLinear(_ParallelLinear):
    """torch.nn.Linear with the weight [O, I] sharded over its columns: this rank multiplies I / R input features.

    Args:
        in_features: I over all ranks; must be divisible by R.
        out_features: O.
        bias: whether the layer has a bias, the same on every rank.
        tp_group: the R ranks; None for this rank only.
        sequence_parallel: the output is this rank's block [S / R, ...] of the sequence.
        sequence_dim: the dim of the input that is the sequence.
        skip_bias_add: leave the bias to a following fused op; forward returns (y, bias).
        input_is_parallel: the input is this rank's [..., I / R]; False: it has all I features, and the layer cuts it.
        overlap: as column_parallel_linear.
        init_std: standard deviation of the initial weight; the full weight is the same for every R.
        device, dtype: as torch.nn.Linear.

    Raises:
        InputError: I is not divisible by R, this rank is not in tp_group.

    Shapes, Communication, Memory: as row_parallel_linear; input_is_parallel=False adds one all-gather of x backward,
    and skip_bias_add under sequence parallelism adds one all-reduce of the gradient of the bias, as
    sharding.used_by_parts.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        tp_group: Group,
        sequence_parallel: bool = False,
        sequence_dim: int = 0,
        skip_bias_add: bool = False,
        input_is_parallel: bool = True,
        overlap: bool | int = True,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = LinearOptions(
            layout=ParallelLayout(tp_group, sequence_parallel, overlap),
            sequence_dim=sequence_dim,
            skip_bias_add=skip_bias_add,
            init_std=init_std,
            device=device,
            dtype=dtype,
        )
        super().__init__(in_features, out_features, bias, _row_shard(in_features, out_features, tp_group), options)
        self.input_is_parallel = input_is_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Apply the layer to x [..., I / R]; returns y [..., O] or its block of the sequence, or (y, bias)."""
        if not self.input_is_parallel:
            check_shape("x", x, (*x.shape[:-1], self.in_features))
            x = split_all_gather(x, -1, self.tp_group)
        y = row_parallel_linear(
            x,
            self.weight,
            None if self.skip_bias_add else self.bias,
            tp_group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
            sequence_dim=self.sequence_dim,
            overlap=self.overlap,
        )
        return (y, self.skipped_bias()) if self.skip_bias_add else y

    def skipped_bias(self) -> torch.Tensor | None:
        """Return the bias for a caller that adds it to y. Its gradient is summed over the ranks in backward."""
        bias: torch.Tensor | None = self.bias
        if bias is not None and self.sequence_parallel:
            # The caller adds the bias to a block of the sequence; the gradient is the sum over all blocks.
            (bias,) = used_by_parts((bias,), self.tp_group)
        return bias


def _column_shard(in_features: int, parts: Sequence[OutputPart], tp_group: Group) -> _Shard:
    """Return this rank's shard: a block of rows of every part, stacked."""
    ranks, rank = group_size(tp_group), group_rank(tp_group)
    weights, biases, start = [], [], 0
    for part in parts:
        name = f"features of {part.name}" if part.name else "out_features"
        check_divisible("tensor_parallel_size", ranks, f"copies of {part.name}", part.copies)
        check_divisible(name, part.features, "tensor_parallel_size", ranks // part.copies)
        size = part.features * part.copies // ranks
        offset, copy = rank // part.copies * size, rank % part.copies
        rows = slice(start, start + size)
        weight = ParameterShard((part.features, in_features), (offset, 0), copy=copy)
        weights.append(ShardPart(part.name, rows, weight))
        biases.append(ShardPart(part.name, rows, ParameterShard((part.features,), (offset,), copy=copy)))
        start += size
    return _Shard((start, in_features), tuple(weights), tuple(biases))


def _row_shard(in_features: int, out_features: int, tp_group: Group) -> _Shard:
    """Return this rank's shard: a block of columns of the weight, and the full bias."""
    ranks, rank = group_size(tp_group), group_rank(tp_group)
    check_divisible("in_features", in_features, "tensor_parallel_size", ranks)
    columns = in_features // ranks
    weight = ParameterShard((out_features, in_features), (0, rank * columns))
    return _Shard((out_features, columns), weight, ParameterShard((out_features,), (0,), replicated=True))


def draw_normal_weight_(weight: nn.Parameter, std: float, seed: int | None, name: str) -> None:
    """Call fill_normal_shard_; without a seed draw one from torch's CPU generator."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    fill_normal_shard_(weight, std, seed=seed, name=name)
