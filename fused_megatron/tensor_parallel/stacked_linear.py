"""A column-parallel linear layer whose output is several features groups side by side: one product, one collective."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fused_megatron.checks import check, check_divisible
from fused_megatron.collectives import Group, group_rank, group_size
from fused_megatron.collectives.transfers import start_all_reduce_
from fused_megatron.sharding import ParameterShard, ShardPart
from fused_megatron.tensor_parallel.linear import ColumnParallelLinear, column_parallel_linear


@dataclass(frozen=True)
class OutputPart:
    """Output features with a full weight of their own.

    Attributes:
        name: of the full weight, in checkpoints and for its initial values.
        features: over all ranks, each counted once.
        copies: how many ranks hold the same features, neighbours: 1, or more where the features are fewer than ranks.
    """

    name: str
    features: int
    copies: int = 1


class StackedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel linears of one input as one product: gate and up, or query, key and value.

    Every part is sharded for itself, and a rank's shards stand one below the other, so that its output is
    [part 0 | part 1 | ..] at every R without a copy, and a checkpoint knows each part by its full weight:

        w_shard     [sum_p O_p c_p / R, H]   rows of part p: block (rank // c_p) of its full weight [O_p, H]
        forward     y_shard = x @ w_shard.T + b_shard
        backward    as ColumnParallelLinear; the gradient of rows that c_p > 1 ranks hold is the sum over these ranks

    Args:
        in_features: H.
        parts: what the output consists of, in this order.
        Others: as ColumnParallelLinear.

    Raises:
        InputError: features times copies of a part are not divisible by R, or R not by copies.

    Communication: as ColumnParallelLinear; with copies one all-reduce of their full weights and biases backward, 4
        bytes an element, so that every copy has the same gradient when backward() returns.
    Memory: as ColumnParallelLinear; with copies the weight's gradient is made in the weight's dtype before a main_grad
        takes it, since what the other ranks add must come in between.
    """

    def __init__(
        self,
        in_features: int,
        parts: Sequence[OutputPart],
        bias: bool = True,
        *,
        tp_group: Group,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        ranks, rank = group_size(tp_group), group_rank(tp_group)
        for part in parts:
            check_divisible("tensor_parallel_size", ranks, f"copies of {part.name}", part.copies)
            check_divisible(f"features of {part.name}", part.features, "tensor_parallel_size", ranks // part.copies)
        check("gather_output" not in options, "gather_output=True would mix the parts (gather what is made of them)")
        local = [part.features * part.copies // ranks for part in parts]
        super().__init__(
            in_features, sum(local) * ranks, bias, tp_group=tp_group, device="meta", dtype=dtype, **options
        )
        self._measure_overlap(device, dtype)
        self.out_features = sum(part.features for part in parts)
        self.part_names = tuple(part.name for part in parts)
        for name, width in (("weight", (in_features,)), ("bias", ())):
            if name == "bias" and not bias:
                continue
            values = nn.Parameter(torch.empty((sum(local), *width), device=device, dtype=dtype))
            shards, start = [], 0
            for part, rows in zip(parts, local, strict=True):
                offset = (rank // part.copies * rows, *(0 for _ in width))
                shard = ParameterShard((part.features, *width), offset, copy=rank % part.copies)
                shards.append(ShardPart(part.name, slice(start, start + rows), shard))
                start += rows
            delattr(self, name)
            self.register_shard(name, values, tuple(shards))
        self._copied = tuple(
            (shard.rows, part.features, shard.shard.offset[0])
            for shard, part in zip(shards, parts, strict=True)
            if part.copies > 1
        )
        self.reset_parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """x [..., H] to y, this rank's features of every part, or (y, bias) with skip_bias_add."""
        weight, bias = self.with_whole_gradients()
        y = column_parallel_linear(
            x, weight, None if self.skip_bias_add else bias, tp_group=self.tp_group,
            sequence_parallel=self.sequence_parallel, sequence_dim=self.sequence_dim, overlap=self.overlap,
        )  # fmt: skip
        return (y, bias) if self.skip_bias_add else y

    def with_whole_gradients(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias, whose gradients in rows that several ranks hold will be summed over these ranks."""
        if not self._copied:
            return self.weight, self.bias
        weight, bias = _SumOverCopies.apply(self.weight, self.bias, self._copied, self.tp_group)
        return weight, bias


class _SumOverCopies(torch.autograd.Function):
    """Identity; backward sums the gradients of rows that several ranks hold, over these ranks.

    A rank puts its rows at their place in the full weight, zeros elsewhere, and all ranks of the group add up: no
    group for every set of copies is needed, and every rank gets the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        copied: tuple[tuple[slice, int, int], ...],
        group: Group,
    ) -> Any:
        ctx.layout = copied, group
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweight: torch.Tensor, dbias: torch.Tensor | None) -> Any:
        copied, group = ctx.layout
        # The bias as one more column, so that it takes no collective of its own.
        columns = dweight if dbias is None else torch.cat([dweight, dbias.unsqueeze(1)], dim=1)
        wide = torch.float64 if columns.dtype == torch.float64 else torch.float32
        full = columns.new_zeros((sum(features for _, features, _ in copied), columns.shape[1]), dtype=wide)
        places, start = [], 0
        for rows, features, offset in copied:
            places.append((rows, slice(start + offset, start + offset + rows.stop - rows.start)))
            start += features
        for rows, place in places:
            full[place] = columns[rows]
        total = start_all_reduce_(full, group).wait()
        columns = columns.clone() if dbias is None else columns
        for rows, place in places:
            columns[rows] = total[place].to(columns.dtype)
        if dbias is None:
            return columns, None, None, None
        return columns[:, :-1], columns[:, -1], None, None
