"""Router of a mixture of experts: it selects the experts of each token, and sums what balances their loads."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from fused_megatron.collectives import Group
from fused_megatron.config import TransformerConfig
from fused_megatron.models.dropout import DropoutMasks
from fused_megatron.ops.autograd_function import AutogradFunction
from fused_megatron.ops.expert_routing import Routes, RoutingRule, route_tokens
from fused_megatron.ops.product import product
from fused_megatron.overlap.weight_gradients import GradientDestination
from fused_megatron.sharding import SequenceLayout, fill_normal_shard_, used_by_parts

# Entries of ExpertRouter.sums after the tokens of each expert.
NUM_REPORTED = 3


class ExpertRouter(nn.Module):
    """Router: logits = x weight^T in float32, then ops.route_tokens.

    The weight is whole on every rank. Where tensor-parallel ranks have different tokens, backward sums its gradient
    over them.

    Args:
        config: sizes and the settings router_*, balance_loss_over.
        tp_group: ranks that have different tokens of the same sequences; None for this rank only.
        dtype, device: of the weight.

    Attributes:
        weight: [E, H].
        selection_bias: buffer [E] float32, added to the scores for the selection only; None without
            config.router_bias_rate.
        previous_load: buffer [E] float32, the tokens of each expert in the previous step, over all ranks; None unless
            config.balance_loss_over is "step".
        sums: buffer [E + 3] float64: the tokens of each expert, the balance loss, the z-loss and the number of dropped
            pairs (token, expert), summed over the microbatches of a step. The sums of all ranks add up to totals.

    Communication: with several tensor-parallel ranks, one all-reduce of 4 E H bytes backward, or the
        sum of the buckets once a step (sharding.used_by_parts).
    Memory: saves x, and as ops.route_tokens.
    """

    selection_bias: torch.Tensor | None
    previous_load: torch.Tensor | None
    sums: torch.Tensor

    def __init__(
        self,
        config: TransformerConfig,
        *,
        tp_group: Group,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        experts = int(config.num_experts or 0)
        self.tp_group, self.init_std, self.jitter = tp_group, config.init_std, config.router_jitter
        self.rule = RoutingRule(
            num_selected=config.experts_per_token,
            scores=config.router_scores,
            normalize=config.router_normalize,
            scale=config.router_scale,
            num_groups=config.router_groups,
            groups_per_token=config.router_groups_per_token,
        )
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size, dtype=dtype, device=device))
        by_bias, by_step = config.router_bias_rate is not None, config.balance_loss_over == "step"
        for name, exists in (("selection_bias", by_bias), ("previous_load", by_step and config.balance_loss > 0)):
            values = torch.zeros(experts, dtype=torch.float32, device=device) if exists else None
            self.register_buffer(name, values)
        sums = torch.zeros(experts + NUM_REPORTED, dtype=torch.float64, device=device)
        self.register_buffer("sums", sums, persistent=False)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weight.shape[0]

    def reset_parameters(self, seed: int, name: str) -> None:
        """Draw the weight from (seed, name); set the buffers to 0."""
        fill_normal_shard_(self.weight, self.init_std, seed=seed, name=name)
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    def forward(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> Routes:
        """Select the experts of each token.

        Args:
            x: [S, B, H], the tokens of this rank.
            noise: [S, B, H] float32, factors of x; None: no noise.
        """
        num_sequences = x.shape[1]
        rows = x.flatten(0, 1)
        if noise is not None:
            rows = rows.float() * noise.flatten(0, 1)
        (weight,) = used_by_parts((self.weight,), self.tp_group)
        logits = float32_product(rows, weight)
        return route_tokens(logits, self.rule, bias=self.selection_bias, num_sequences=num_sequences)

    def noise(self, dropout: DropoutMasks, which: int, sequence: SequenceLayout, shape: torch.Size) -> torch.Tensor:
        """Return random factors in [1 - jitter, 1 + jitter) of the inputs, the same in every layout.

        Args:
            dropout: the random states of the block.
            which: index of the router's state among them.
            sequence: the positions of this rank's tokens.
            shape: [S, B, H] of the inputs.
        """
        return 1.0 + self.jitter * (2.0 * dropout.uniform(which, sequence, shape) - 1.0)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Convert the module as torch does, but leave the dtypes of the buffers: they sum small changes."""
        kept = {name: buffer for name, buffer in self.named_buffers(recurse=False)}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


def float32_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute x weight^T [T, O] in float32 from x [T, I] and weight [O, I] of any dtype; float64 stays float64.

    Memory: saves x and weight in their own dtypes.
    """
    result: torch.Tensor = _Float32Product.apply(x, weight)
    return result


class _Float32Product(AutogradFunction):
    op = "models.router"

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.destination = GradientDestination(weight)
        return product(*_wide(x, weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        dx = product(dy, weight.to(dy.dtype).t()).to(x.dtype) if needs_x else None
        # A weight gradient that is put off keeps x in its own dtype.
        dweight = ctx.destination.add(lambda: (dy, x.to(dy.dtype))) if needs_weight else None
        return dx, None if dweight is None else dweight.to(weight.dtype)


def _wide(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return x.to(dtype), weight.to(dtype)
