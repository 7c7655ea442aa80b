"""Column-parallel linear layer with several outputs (query, key and value; gate and up) from one product."""

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
    """Several column-parallel linear layers of one input as one product: gate and up, or query, key and value.

    Each part is sharded separately, and a rank's shards are stacked. So the output of a rank is [part 0 | part 1 | ..]
    for every R without a copy, and a checkpoint stores the full weight of each part:

        w_shard     [sum_p O_p c_p / R, H]   rows of part p: block (rank // c_p) of its full weight [O_p, H]
        forward     y_shard = x @ w_shard.T + b_shard
        backward    as ColumnParallelLinear; the gradient of rows that c_p > 1 ranks hold is the sum over these ranks

    Args:
        in_features: H.
        parts: the parts of the output, in this order.
        Others: as ColumnParallelLinear.

    Raises:
        InputError: R does not divide features times copies of a part, or copies does not divide R.

    Communication: as ColumnParallelLinear. Parts with copies add one all-reduce of their full weights and biases in
        backward, 4 bytes an element, so that all copies have the same gradient.
    Memory: as ColumnParallelLinear. With copies the weight's gradient is made in the weight's dtype before it is added
        to a main_grad, since the sum over the copies comes in between.
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
        """Apply the layer to x [..., H]; returns y, this rank's features of every part, or (y, bias)."""
        weight, bias = self.with_whole_gradients()
        y = column_parallel_linear(
            x,
            weight,
            None if self.skip_bias_add else bias,
            tp_group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
            sequence_dim=self.sequence_dim,
            overlap=self.overlap,
        )
        return (y, bias) if self.skip_bias_add else y

    def with_whole_gradients(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight and bias. In backward the gradients of rows with copies are summed over their ranks."""
        if not self._copied:
            return self.weight, self.bias
        weight, bias = _SumOverCopies.apply(self.weight, self.bias, self._copied, self.tp_group)
        return weight, bias

    def with_whole_gradient(self, vector: torch.Tensor) -> torch.Tensor:
        """Return a vector with the shards of the bias; in backward as with_whole_gradients."""
        if not self._copied:
            return vector
        column, _ = _SumOverCopies.apply(vector.unsqueeze(1), None, self._copied, self.tp_group)
        whole: torch.Tensor = column.squeeze(1)
        return whole


class _SumOverCopies(AutogradFunction):
    """Identity, whose backward sums the gradients of rows with copies over the ranks that hold them.

    Each rank writes its rows into a full gradient of zeros, and all ranks of the group sum it. So no process group for
    each set of copies is needed, and every rank gets the same bits.
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
        # The gradient of the bias is one more column, so that it needs no collective of its own.
        columns = dweight if dbias is None else torch.cat([dweight, dbias.unsqueeze(1)], dim=1)
        wide = torch.float64 if columns.dtype == torch.float64 else torch.float32
        full = columns.new_zeros((sum(features for _, features, _ in copied), columns.shape[1]), dtype=wide)
        rows_in_full, start = [], 0
        for rows, features, offset in copied:
            rows_in_full.append((rows, slice(start + offset, start + offset + rows.stop - rows.start)))
            start += features
        for rows, full_rows in rows_in_full:
            full[full_rows] = columns[rows]
        total = start_all_reduce_(full, group).wait()
        columns = columns.clone() if dbias is None else columns
        for rows, full_rows in rows_in_full:
            columns[rows] = total[full_rows].to(columns.dtype)
        if dbias is None:
            return columns, None, None, None
        return columns[:, :-1], columns[:, -1], None, None
