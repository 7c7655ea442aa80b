"""The two-layer MLP of a transformer block, plain or gated, its width split over tensor-parallel ranks."""

from typing import Any

import torch
from torch import nn

from fused_megatron.checks import check_divisible, check_one_of
from fused_megatron.collectives import Group, group_size
from fused_megatron.tensor_parallel import (
    ColumnParallelLinear,
    OutputPart,
    RowParallelLinear,
    StackedColumnParallelLinear,
    parallel_mlp,
)

PLAIN_ACTIVATIONS = ("gelu", "gelu_exact")
ACTIVATIONS = ("gelu", "swiglu", "geglu", "gelu_exact")


class ParallelMLP(nn.Module):
    """projection(activation(expansion(x))), with the bias of the expansion fused into the activation.

    gelu, gelu_exact  x [S, B, H] -> [S, B, F / R] -> [S, B, H]
    swiglu, geglu     x [S, B, H] -> [gate | up] [S, B, 2 F / R] -> act(gate) * up [S, B, F / R] -> [S, B, H]

    Gate and up are the same block of features of two full weights [F, H], multiplied as one (a checkpoint holds them
    as expansion.weight.gate and expansion.weight.up).

    Args:
        hidden_size: H.
        ffn_hidden_size: F; must be divisible by the size R of tp_group.
        activation: "gelu" (tanh), "gelu_exact" (erf), "swiglu" or "geglu" (tanh).
        bias: whether both layers have biases.
        tp_group: tensor-parallel group; None means one rank.
        sequence_parallel: x and the result are sequence shards [S / R, B, H].
        skip_bias_add: leave the bias of the projection to a following fused op; forward returns (y, bias).
        init_std, output_init_std: standard deviations of the initial weights.

    Communication:
        As ParallelSelfAttention.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        activation: str = "gelu",
        bias: bool = True,
        tp_group: Group,
        sequence_parallel: bool = False,
        skip_bias_add: bool = False,
        init_std: float = 0.02,
        output_init_std: float = 0.02,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        check_one_of("activation", activation, ACTIVATIONS)
        check_divisible("ffn_hidden_size", ffn_hidden_size, "tensor_parallel_size", group_size(tp_group))
        layout: dict[str, Any] = {
            "tp_group": tp_group,
            "sequence_parallel": sequence_parallel,
            "dtype": dtype,
            "device": device,
        }
        self.activation, self.skip_bias_add = activation, skip_bias_add
        self.expansion: ColumnParallelLinear
        if activation in PLAIN_ACTIVATIONS:
            self.expansion = ColumnParallelLinear(
                hidden_size, ffn_hidden_size, bias, skip_bias_add=True, init_std=init_std, **layout
            )
        else:
            parts = [OutputPart(name, ffn_hidden_size) for name in ("gate", "up")]
            self.expansion = StackedColumnParallelLinear(
                hidden_size, parts, bias, skip_bias_add=True, init_std=init_std, **layout
            )
        self.projection = RowParallelLinear(
            ffn_hidden_size, hidden_size, bias, skip_bias_add=skip_bias_add, init_std=output_init_std, **layout
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """x [S, B, H], or [S / R, B, H] under sequence parallelism, to the same shape; (y, bias) with skip_bias_add."""
        expansion, projection = self.expansion, self.projection
        # Both layers as one: chunks of rows go through both products, and collectives hide under all of them.
        y = parallel_mlp(
            x, expansion.weight, expansion.bias, projection.weight, None if self.skip_bias_add else projection.bias,
            activation=self.activation, tp_group=expansion.tp_group, sequence_parallel=expansion.sequence_parallel,
            overlap=expansion.overlap,
        )  # fmt: skip
        return (y, projection.skipped_bias()) if self.skip_bias_add else y
