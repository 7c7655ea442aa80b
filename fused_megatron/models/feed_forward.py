"""What a block does to every token by itself: the two-layer MLP, and the registry of what may stand in its place."""

from typing import Protocol

import torch
from torch import nn

from fused_megatron.checks import check_divisible, check_one_of
from fused_megatron.collectives import group_size
from fused_megatron.config import TransformerConfig
from fused_megatron.mesh import ParallelLayout
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
        config: sizes and forms; ffn_size F must be divisible by the size R of the tensor-parallel group.
        layout: how it is cut over ranks; under sequence parallelism x and the result are sequence shards [S / R, B, H].
        skip_bias_add: leave the bias of the projection to a following fused op; forward returns (y, bias).
        dtype, device: of the parameters.

    Raises:
        InputError: an activation that is not known, a width that the ranks do not divide.

    Communication:
        As ParallelSelfAttention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layout: ParallelLayout,
        skip_bias_add: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        check_one_of("activation", config.activation, ACTIVATIONS)
        check_divisible("ffn_hidden_size", config.ffn_size, "tensor_parallel_size", group_size(layout.tp_group))
        self.activation, self.skip_bias_add = config.activation, skip_bias_add
        self.expansion: ColumnParallelLinear
        if config.activation in PLAIN_ACTIVATIONS:
            self.expansion = ColumnParallelLinear(
                config.hidden_size,
                config.ffn_size,
                config.linear_biases,
                skip_bias_add=True,
                init_std=config.init_std,
                tp_group=layout.tp_group,
                sequence_parallel=layout.sequence_parallel,
                overlap=layout.overlap,
                dtype=dtype,
                device=device,
            )
        else:
            self.expansion = StackedColumnParallelLinear(
                config.hidden_size,
                [OutputPart("gate", config.ffn_size), OutputPart("up", config.ffn_size)],
                config.linear_biases,
                skip_bias_add=True,
                init_std=config.init_std,
                tp_group=layout.tp_group,
                sequence_parallel=layout.sequence_parallel,
                overlap=layout.overlap,
                dtype=dtype,
                device=device,
            )
        self.projection = RowParallelLinear(
            config.ffn_size,
            config.hidden_size,
            config.linear_biases,
            skip_bias_add=skip_bias_add,
            init_std=config.output_init_std,
            tp_group=layout.tp_group,
            sequence_parallel=layout.sequence_parallel,
            overlap=layout.overlap,
            dtype=dtype,
            device=device,
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


class FeedForwardBuilder(Protocol):
    """Makes the feed-forward of a block.

    The module takes x [S, B, H], or its sequence shard, and returns (y, bias): y of the shape of x, bias [H] or None,
    which the block adds together with dropout and the residual. In training it may return
    WithAuxiliaryLoss((y, bias), loss).
    """

    def __call__(
        self,
        config: TransformerConfig,
        *,
        layout: ParallelLayout,
        dtype: torch.dtype | None,
        device: torch.device | None,
    ) -> nn.Module:
        """The module, with weights that reset_layers (block.py) will draw."""


def _new_mlp(
    config: TransformerConfig, *, layout: ParallelLayout, dtype: torch.dtype | None, device: torch.device | None
) -> nn.Module:
    return ParallelMLP(config, layout=layout, skip_bias_add=True, dtype=dtype, device=device)


# By config.feed_forward.
FEED_FORWARDS: dict[str, FeedForwardBuilder] = {"mlp": _new_mlp}
