"""Parallel replacements for the linears, heads and norms of existing models, with any leading dims."""

from typing import Any

import torch
from torch import nn

from fused_megatron import modules
from fused_megatron.collectives import (
    Group,
    all_gather_split,
    group_rank,
    group_size,
    identity_all_reduce_together,
    split_all_gather,
)
from fused_megatron.interop.sequence_region import SEQUENCE_DIM, SequenceRegion, SharedInput
from fused_megatron.interop.vocab_logits import LogitsScope, deferred_vocab_logits, vocab_logits
from fused_megatron.modules.fused_head import can_defer
from fused_megatron.sharding import copy_with_groups
from fused_megatron.tensor_parallel import (
    OutputPart,
    ParameterShard,
    RowParallelLinear,
    ShardedModule,
    StackedColumnParallelLinear,
    column_parallel_linear,
    row_parallel_linear,
)

# torch.compile breaks its graphs at these layers: there is nothing to fuse with a collective, and a trace would
# include the choice of how collectives overlap.
_REASON = "a collective of fused_megatron"


class ColumnLinear(StackedColumnParallelLinear):
    """A linear layer sharded over its output features; stacked parts (query, key, value) are sharded one by one.

    Attributes:
        transposed: the model stores the weight as [I, O] (GPT-2), and so does full_state_dict.
        shared: the input that this layer has in common with other linears; one all-reduce in backward serves all.
        region: the stack of layers that runs on blocks of the sequence; None without sequence parallelism.
        gathered: a hook gathers the sequence for the module around this layer, so the layer need not.
    """

    transposed = False
    shared: SharedInput | None = None
    region: SequenceRegion | None = None
    gathered = False

    @property
    def has_local_operands(self) -> bool:
        """Whether the layer is one product of this rank: others gather its input, and sum its gradient."""
        alone = group_size(self.tp_group) == 1
        if self._copied or self.transposed:
            return False
        return self.gathered if self.region is not None and self.region.active else alone or self.shared is not None

    def local_operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return what this rank multiplies: the input, this rank's weight and bias (modules.GatedMLP)."""
        return entered(self, x)[0], self.weight, self.bias

    @torch.compiler.disable(reason=_REASON)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., I], or this rank's block of the sequence, to this rank's features [..., O / R] of all parts."""
        weight, bias = self.with_whole_gradients()
        x, group, sequence_parallel = entered(self, x)
        return column_parallel_linear(
            x,
            weight,
            bias,
            tp_group=group,
            sequence_parallel=sequence_parallel,
            sequence_dim=SEQUENCE_DIM,
            overlap=self.overlap,
        )


class GatheredLinear(ShardedModule):
    """A linear layer that computes its output features in shards and gathers them: a head. R need not divide O.

        w_shard [ceil(O / R), I]    from row rank * ceil(O / R); rows from O on are padding (zeros)
        forward     y [..., O] = all_gather(x @ w_shard.T + b_shard)[..., :O]
        backward    dx = sum over ranks of dy_shard @ w_shard; every rank must compute the same loss

    The head of a model (with a `scope`) returns VocabLogits while the model's forward runs: logits that keep their
    shard.

    Attributes:
        transposed, shared, region, gathered: as in ColumnLinear.
        scope: tells whether the model's forward runs; None if the layer is no head.

    Communication: one all-gather of y in forward (none if gather_logits=False), one all-reduce of dx in backward.
    """

    transposed = False
    shared: SharedInput | None = None
    region: SequenceRegion | None = None
    gathered = False
    scope: LogitsScope | None = None
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool, *, tp_group: Group, overlap: bool | int, dtype: Any
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.tp_group = tp_group
        self.overlap = overlap
        rows = -(-out_features // group_size(tp_group))
        rank = group_rank(tp_group)
        for name, width in (("weight", (in_features,)), ("bias", ()))[: 1 + bias]:
            shard = ParameterShard((out_features, *width), (rank * rows, *(0 for _ in width)))
            values = nn.Parameter(torch.empty((rows, *width), device="meta", dtype=dtype))
            self.register_shard(name, values, shard)
        if not bias:
            self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., I] to all features [..., O], the same on every rank."""
        # A compiled graph knows only plain tensors.
        return self._forward(x, torch.compiler.is_compiling())

    @torch.compiler.disable(reason=_REASON)
    def _forward(self, x: torch.Tensor, compiling: bool) -> torch.Tensor:
        if self._defers(x) and not compiling:
            return deferred_vocab_logits(x, self.weight, self.bias, self.out_features, self.tp_group)
        x, group, sequence_parallel = entered(self, x)
        y = column_parallel_linear(
            x,
            self.weight,
            self.bias,
            tp_group=group,
            sequence_parallel=sequence_parallel,
            sequence_dim=SEQUENCE_DIM,
            overlap=self.overlap,
        )
        if self.scope is None or not self.scope.running or compiling:
            return all_gather_split(y, -1, self.tp_group)[..., : self.out_features]
        return vocab_logits(y, self.out_features, self.tp_group, self.scope.gather or not torch.is_grad_enabled())

    def _defers(self, x: torch.Tensor) -> bool:
        """Whether the loss can be computed without the logits: nobody gathers them, and x is whole on every rank."""
        if self.scope is None or not self.scope.running or self.scope.gather or self.shared is not None:
            return False
        return (self.region is None or not self.region.active) and can_defer(self, x)

    def extra_repr(self) -> str:
        """Describe the layer for print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"tensor_parallel_size={group_size(self.tp_group)}"
        )


def entered(layer: ColumnLinear | GatheredLinear, x: torch.Tensor) -> tuple[torch.Tensor, Group, bool]:
    """Return (x, tp_group, sequence_parallel) for column_parallel_linear.

    tp_group is None if a hook gathers x, or if a SharedInput sums the gradient of x.
    """
    if layer.region is not None and layer.region.active:
        return (x, None, False) if layer.gathered else (x, layer.tp_group, True)
    if layer.shared is not None:
        return layer.shared.take(x), None, False
    return x, layer.tp_group, False


class RowLinear(RowParallelLinear):
    """A linear layer sharded over its input features; attributes as in ColumnLinear."""

    transposed = False
    region: SequenceRegion | None = None

    @torch.compiler.disable(reason=_REASON)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., I / R] (or [..., I] with input_is_parallel=False) to y [..., O], or its block of the sequence."""
        if not self.input_is_parallel:
            x = split_all_gather(x, -1, self.tp_group)
        return row_parallel_linear(
            x,
            self.weight,
            self.bias,
            tp_group=self.tp_group,
            overlap=self.overlap,
            sequence_dim=SEQUENCE_DIM,
            sequence_parallel=self.region is not None and self.region.active,
        )


class SummedAdoptedRMSNorm(modules.AdoptedRMSNorm):
    """An adopted RMS norm that sees only this rank's rows; its backward sums the gradient of the weight over ranks."""

    tp_group: Group

    @torch.compiler.disable(reason=_REASON)
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise [..., H]; returns the same shape."""
        (weight,) = identity_all_reduce_together((self.weight,), self.tp_group)
        return self._normalise(hidden_states, weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy_with_groups(self, (self.tp_group,), memo)


def make_column(
    in_features: int, features: int, bias: bool, *, parts: int, copies: int, tp_group: Group, overlap: Any, dtype: Any
) -> ColumnLinear:
    """Make a ColumnLinear of `parts` equal parts on the meta device."""
    names = [""] if parts == 1 else [f"part {i}" for i in range(parts)]
    each = [OutputPart(name, features // parts, copies) for name in names]
    with torch.random.fork_rng(devices=[]):  # initial values are dropped: they must not advance the caller's generator
        return ColumnLinear(in_features, each, bias, tp_group=tp_group, device="meta", dtype=dtype, overlap=overlap)
