"""The two-layer MLP of a transformer block, sharded over the tensor-parallel ranks."""

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
    """Two-layer MLP: projection(activation(expansion(x))); the activation adds the bias of the expansion.

    gelu, gelu_exact  x [S, B, H] -> [S, B, F / R] -> [S, B, H]
    swiglu, geglu     x [S, B, H] -> [gate | up] [S, B, 2 F / R] -> act(gate) * up [S, B, F / R] -> [S, B, H]

    `expansion` is the up projection, `projection` the down projection. With a gate, a rank multiplies its rows of two
    full weights [F, H] as one stacked weight; a checkpoint holds expansion.weight.gate and expansion.weight.up.

    Args:
        config: sizes and options; ffn_size F must be divisible by the size R of the tensor-parallel group.
        layout: how the layer is cut over ranks; under sequence parallelism x and the result are sequence shards
            [S / R, B, H].
        skip_bias_add: leave the bias of the projection to a following fused op; forward returns (y, bias).
        dtype, device: of the parameters.

    Raises:
        InputError: an unknown activation, or an ffn_size that cannot be divided over the ranks.

    Communication:
        One all-reduce of S B H elements forward and one backward (each an all-gather and a reduce-scatter under
        sequence parallelism).
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
        """Return y, of the shape of x, or (y, bias) with skip_bias_add.

        Args:
            x: activations [S, B, H], or [S / R, B, H] under sequence parallelism.
        """
        expansion, projection = self.expansion, self.projection
        # Both layers in one call: each chunk of rows goes through both products, and collectives hide under all of it.
        y = parallel_mlp(
            x,
            expansion.weight,
            expansion.bias,
            projection.weight,
            None if self.skip_bias_add else projection.bias,
            activation=self.activation,
            tp_group=expansion.tp_group,
            sequence_parallel=expansion.sequence_parallel,
            overlap=expansion.overlap,
        )
        return (y, projection.skipped_bias()) if self.skip_bias_add else y
