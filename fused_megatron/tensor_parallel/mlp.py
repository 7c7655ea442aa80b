"""Both linear layers of an MLP and what is between them, as one function that hides its collectives."""

import functools
from collections.abc import Callable

import torch

from fused_megatron import ops
from fused_megatron.checks import check
from fused_megatron.collectives import Group, group_size, on_ranks
from fused_megatron.overlap import Activation, ColumnLinearFunction, MLPFunction, RowLinearFunction, chunk_choice
from fused_megatron.tensor_parallel.linear import autocast_operands, check_operands, sharded_sequence_dim

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


def parallel_mlp(
    x: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    *,
    activation: str = "gelu",
    tp_group: Group,
    sequence_parallel: bool = False,
    sequence_dim: int = 0,
    overlap: bool | int = True,
) -> torch.Tensor:
    """The MLP of a transformer block, with its width sharded, and its collectives under all of its products.

    Equals, for activation "gelu", F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias) on
    one rank, and column_parallel_linear, the activation and row_parallel_linear on several:

        x           [S, B, H], or this rank's [S / R, B, H] under sequence parallelism
        forward     h_shard_f [S, B, F / R] = x @ up_shard_f.T;  a_shard_f = activation(h_shard_f + up_bias_shard_f)
                    y [S, B, H] = sum over ranks of a_shard_f @ down_shard_f.T, + down_bias
        backward    dx = sum over ranks of dh_shard_f @ up_shard_f

    Layer by layer the forward's collective can hide under one product and the backward's under two; here chunks of
    rows go through both products, and it is two and four.

    Args:
        x: [..., H] float; replicated, or under sequence parallelism this rank's block of sequence_dim.
        up_weight: [F / R, H], for the gated activations [2 F / R, H]: this rank's gate, then its value.
        up_bias: [F / R] ([2 F / R]) or None.
        down_weight: [H, F / R].
        down_bias: [H] or None; the same on every rank.
        activation: "gelu", "swiglu" or "geglu" (tanh in both GELUs), or "gelu_exact" (erf).
        tp_group: the R ranks; None for this one alone.
        sequence_parallel: x and y are blocks of the sequence.
        sequence_dim: which dim of x is the sequence; not the last. The chunks need it first: else layer by layer.
        overlap: into how many chunks of rows: True as the cost model of the group says, a number: so many, False: one.

    Returns:
        [..., H] as x, dtype of x.

    Raises:
        InputError: shapes that do not fit, an unknown activation, this rank not in tp_group.
        TypeError: dtypes that differ.

    Communication: as column_parallel_linear and row_parallel_linear together.
    Memory: x, h_shard_f and the weights are saved; a_shard_f is computed again in backward.
    Numerics: bit for bit the layers', where products of some rows are those of all (the CPU's are not always, nor are
        sums over three ranks or more), except for the gradient of up_bias, summed chunk by chunk in float32, and under
        sequence parallelism those of the weights and down_bias, summed over the rows in the order of the chunks.
    """
    check(activation in _ACTIVATIONS, f"activation={activation!r} must be one of {', '.join(map(repr, _ACTIVATIONS))}")
    group_size(tp_group)
    fused_activation, raw_activation = _ACTIVATIONS[activation]
    _, down_weight, down_bias = autocast_operands(x, down_weight, down_bias)
    x, up_weight, up_bias = autocast_operands(x, up_weight, up_bias)
    check_operands(x, up_weight, up_bias)
    width = up_weight.shape[0] // (1 if activation.startswith("gelu") else 2)
    check_operands(x.new_empty(0, width), down_weight, down_bias)
    dim = sharded_sequence_dim(x, sequence_parallel, sequence_dim, tp_group)
    choice = chunk_choice(overlap)
    whole = group_size(tp_group) == 1 or choice.fixed == 1 or dim not in (None, 0) or x.dtype == torch.float64
    if whole or choice.prefers_layers(x, dim, tp_group):
        h = on_ranks(ColumnLinearFunction, tp_group)(x, up_weight, None, dim, tp_group, choice)
        a = fused_activation(h, up_bias)
        y: torch.Tensor = on_ranks(RowLinearFunction, tp_group)(a, down_weight, down_bias, dim, tp_group, choice)
        return y
    return on_ranks(MLPFunction, tp_group)(
        x, up_weight, up_bias, down_weight, down_bias, raw_activation, dim is not None, tp_group, choice
    )
