"""A column-parallel linear layer whose output is several features groups side by side: one product, one collective."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fused_megatron.collectives import Group
from fused_megatron.collectives.transfers import start_all_reduce_
from fused_megatron.ops.autograd_function import AutogradFunction
from fused_megatron.sharding import parameter_parts
from fused_megatron.tensor_parallel.linear import ColumnParallelLinear, OutputPart, column_parallel_linear


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
        sequence_parallel: bool = False,
        sequence_dim: int = 0,
        skip_bias_add: bool = False,
        overlap: bool | int = True,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            parts,
            bias,
            tp_group=tp_group,
            sequence_parallel=sequence_parallel,
            sequence_dim=sequence_dim,
            skip_bias_add=skip_bias_add,
            overlap=overlap,
            init_std=init_std,
            device=device,
            dtype=dtype,
        )
        self.part_names = tuple(part.name for part in parts)
        shards = zip(parts, parameter_parts(self.weight), strict=True)
        self._copied = tuple(
            (shard.rows, part.features, shard.shard.offset[0]) for part, shard in shards if part.copies > 1
        )

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


class _SumOverCopies(AutogradFunction):
    """Identity; backward sums the gradients of rows that several ranks hold, over these ranks.

    A rank puts its rows at their place in the full weight, zeros elsewhere, and all ranks of the group add up: no
    group for every set of copies is needed, and every rank gets the same bits.
    """

    op = "tensor_parallel.StackedColumnParallelLinear"

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
