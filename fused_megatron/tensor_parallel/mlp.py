"""Tensor-parallel MLP as one function: two linear layers, the activation between them, and hidden collectives."""

import functools
from collections.abc import Callable

import torch

from fused_megatron import ops
from fused_megatron.checks import check
from fused_megatron.collectives import Group, group_size, on_ranks
from fused_megatron.deprecation import renamed_argument
from fused_megatron.ops.product import product
from fused_megatron.overlap import (
    Activation,
    ChunkChoice,
    ColumnLinearFunction,
    MLPFunction,
    RowLinearFunction,
    chunk_choice,
)
from fused_megatron.overlap.overlapped_linear import autocast_operands
from fused_megatron.overlap.timed_ways import RunMLP
from fused_megatron.tensor_parallel.linear import check_operands, is_plain_product, sharded_sequence_dim

_RAW = torch.ops.fused_megatron
_ACTIVATIONS: dict[str, tuple[Callable[..., torch.Tensor], Activation]] = {
    "gelu": (
        ops.bias_gelu,
        Activation(
            lambda h, bias: _RAW.bias_gelu_forward(h, bias, True),
            lambda da, h, bias, *needs: _RAW.bias_gelu_backward(da, h, bias, True, *needs),
        ),
    ),
    "gelu_exact": (
        functools.partial(ops.bias_gelu, approximate="none"),
        Activation(
            lambda h, bias: _RAW.bias_gelu_forward(h, bias, False),
            lambda da, h, bias, *needs: _RAW.bias_gelu_backward(da, h, bias, False, *needs),
        ),
    ),
    "geglu": (
        ops.bias_geglu,
        Activation(
            lambda h, bias: _RAW.bias_geglu_forward(h, bias, True),
            lambda da, h, bias, *needs: _RAW.bias_geglu_backward(da, h, bias, True, *needs),
        ),
    ),
    "swiglu": (
        ops.bias_swiglu,
        Activation(
            lambda h, bias: _RAW.bias_swiglu_forward(h, bias),
            lambda da, h, bias, *needs: _RAW.bias_swiglu_backward(da, h, bias, *needs),
        ),
    ),
}


@renamed_argument(old="up_weight", new="expansion_weight")
@renamed_argument(old="up_bias", new="expansion_bias")
@renamed_argument(old="down_weight", new="projection_weight")
@renamed_argument(old="down_bias", new="projection_bias")
def parallel_mlp(
    x: torch.Tensor,
    expansion_weight: torch.Tensor,
    expansion_bias: torch.Tensor | None,
    projection_weight: torch.Tensor,
    projection_bias: torch.Tensor | None,
    *,
    activation: str = "gelu",
    tp_group: Group,
    sequence_parallel: bool = False,
    sequence_dim: int = 0,
    overlap: bool | int = True,
) -> torch.Tensor:
    """MLP of a transformer block, sharded over its width F, whose collectives hide under the products of both layers.

    With activation "gelu" one rank computes

        F.linear(F.gelu(F.linear(x, expansion_weight, expansion_bias), approximate="tanh"),
                 projection_weight, projection_bias)

    and several ranks compute column_parallel_linear, the activation and row_parallel_linear:

        x           [S, B, H], or this rank's [S / R, B, H] under sequence parallelism
        forward     h_shard_f [S, B, F / R] = x @ expansion_shard_f.T
                    a_shard_f = activation(h_shard_f + expansion_bias_shard_f)
                    y [S, B, H] = sum over ranks of a_shard_f @ projection_shard_f.T, + projection_bias
        backward    dx = sum over ranks of dh_shard_f @ expansion_shard_f

    Layer by layer the forward's collective can hide under one product and the backward's under two. Here chunks of rows
    go through both layers, so that it hides under two and four.

    Args:
        x: [..., H] float; replicated, or under sequence parallelism this rank's block of sequence_dim.
        expansion_weight: [F / R, H]; for gated activations [2 F / R, H], this rank's gate above this rank's up part.
        expansion_bias: [F / R] ([2 F / R]) or None.
        projection_weight: [H, F / R].
        projection_bias: [H] or None; the same on every rank.
        activation: "gelu", "swiglu" or "geglu" (tanh in both GELUs), or "gelu_exact" (erf).
        tp_group: the R ranks; None for this rank only.
        sequence_parallel: x and y are blocks of the sequence.
        sequence_dim: the dim of x that is the sequence; not the last. With another dim than 0 the MLP runs layer by
            layer, without chunks.
        overlap: number of chunks of rows: True lets the cost model of the group choose, a number fixes it, False is 1.

    Returns:
        [..., H] as x, dtype of x.

    Raises:
        InputError: shapes that do not fit, an unknown activation, this rank not in tp_group.
        TypeError: dtypes that differ.

    Communication: as column_parallel_linear and row_parallel_linear together.
    Memory: x, h_shard_f and the weights are saved; a_shard_f is computed again in backward.
    Numerics: bitwise the result of the layers, where a product of some rows equals these rows of the whole product (not
        always on a CPU) and at most two ranks are summed. Two exceptions: the gradient of expansion_bias is summed
        chunk by chunk in float32; under sequence parallelism the gradients of the weights and of projection_bias are
        summed over the rows in the order of the chunks.
    """
    check(activation in _ACTIVATIONS, f"activation={activation!r} must be one of {', '.join(map(repr, _ACTIVATIONS))}")
    group_size(tp_group)
    _, projection_weight, projection_bias = autocast_operands(x, projection_weight, projection_bias)
    x, expansion_weight, expansion_bias = autocast_operands(x, expansion_weight, expansion_bias)
    check_operands(x, expansion_weight, expansion_bias)
    width = expansion_weight.shape[0] // (1 if activation.startswith("gelu") else 2)
    check_operands(x.new_empty(0, width), projection_weight, projection_bias)
    if is_plain_product(tp_group):
        a = _ACTIVATIONS[activation][0](product(x, expansion_weight), expansion_bias)
        return product(a, projection_weight, projection_bias)
    dim = sharded_sequence_dim(x, sequence_parallel, sequence_dim, tp_group)
    choice = chunk_choice(overlap)
    whole = prefers_layers(x, expansion_weight, projection_weight, activation, dim, tp_group, choice)
    operands = x, expansion_weight, expansion_bias, projection_weight, projection_bias
    return _run(operands, activation, dim, tp_group, choice, by_layers=whole)


def prefers_layers(
    x: torch.Tensor,
    expansion_weight: torch.Tensor,
    projection_weight: torch.Tensor,
    activation: str,
    dim: int | None,
    tp_group: Group,
    choice: ChunkChoice,
) -> bool:
    """Whether parallel_mlp runs layer by layer, not in chunks of rows; dim is the dim of x that is sharded, or None."""
    if group_size(tp_group) == 1 or choice.fixed == 1 or dim not in (None, 0) or x.dtype == torch.float64:
        return True
    both = expansion_weight, projection_weight
    return choice.prefers_layers(x, both, dim, tp_group, _forward_of(activation))


def _run(
    operands: tuple[torch.Tensor | None, ...],
    activation: str,
    dim: int | None,
    tp_group: Group,
    choice: ChunkChoice,
    by_layers: bool,
) -> torch.Tensor:
    """Run the MLP layer by layer, or in chunks of rows that go through both layers; operands as parallel_mlp."""
    x, expansion_weight, expansion_bias, projection_weight, projection_bias = operands
    fused_activation, raw_activation = _ACTIVATIONS[activation]
    y: torch.Tensor
    if by_layers:
        h = on_ranks(ColumnLinearFunction, tp_group)(x, expansion_weight, None, dim, tp_group, choice)
        a = fused_activation(h, expansion_bias)
        project = on_ranks(RowLinearFunction, tp_group)
        y = project(a, projection_weight, projection_bias, dim, tp_group, choice)
        return y
    in_chunks = on_ranks(MLPFunction, tp_group)
    y = in_chunks(*operands, raw_activation, dim is not None, tp_group, choice)
    return y


@functools.cache
def _forward_of(activation: str) -> RunMLP:
    """Return the forward of a sharded sequence for ChunkChoice, which times it; the same object for each activation."""

    def forward(
        x: torch.Tensor, expansion: torch.Tensor, projection: torch.Tensor, tp_group: Group, by_layers: bool
    ) -> torch.Tensor:
        return _run((x, expansion, None, projection, None), activation, 0, tp_group, chunk_choice(True), by_layers)

    return forward
