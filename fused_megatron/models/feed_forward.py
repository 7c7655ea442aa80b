"""Table of the kinds of feed-forward layers of a transformer block."""

from typing import Protocol

import torch
from torch import nn

from fused_megatron.config import TransformerConfig
from fused_megatron.mesh import ParallelLayout
from fused_megatron.models.mixture_of_experts import MixtureOfExperts
from fused_megatron.models.parallel_mlp import ParallelMLP


class FeedForwardBuilder(Protocol):
    """Function that makes the feed-forward of a block.

    The module takes x [S, B, H], or its sequence shard, and returns (y, bias). y has the shape of x; bias is [H] or
    None, and the block adds it together with dropout and the residual. In training the module may return
    WithAuxiliaryLoss((y, bias), loss) instead.
    """

    def __call__(
        self,
        config: TransformerConfig,
        *,
        layout: ParallelLayout,
        dtype: torch.dtype | None,
        device: torch.device | None,
    ) -> nn.Module:
        """Return the module; reset_layers (block.py) draws its weights later."""


def _new_mlp(
    config: TransformerConfig, *, layout: ParallelLayout, dtype: torch.dtype | None, device: torch.device | None
) -> nn.Module:
    return ParallelMLP(config, layout=layout, skip_bias_add=True, dtype=dtype, device=device)


# Keys are values of config.feed_forward, and "experts" for blocks with experts.
FEED_FORWARDS: dict[str, FeedForwardBuilder] = {"mlp": _new_mlp, "experts": MixtureOfExperts}
