"""RMS norm over the features of all heads together, where each tensor-parallel rank has some of the heads."""

import torch
from torch import nn

from fused_megatron import ops
from fused_megatron.collectives import Group, all_reduce_identity, group_rank, group_size, identity_all_reduce
from fused_megatron.sharding import ParameterShard, ShardedModule


class AllHeadsRMSNorm(ShardedModule):
    """Weight of an RMS norm over N heads of D features (OLMoE); a rank has the features of its N / R heads.

    Args:
        num_heads: N; R divides it.
        head_dim: D.
        eps: added to the mean square.
        tp_group: the R ranks; None for this rank only.
        dtype, device: of the weight [N D / R].
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        eps: float,
        *,
        tp_group: Group,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.features, self.eps, self.tp_group = num_heads * head_dim, eps, tp_group
        own = self.features // group_size(tp_group)
        shard = ParameterShard((self.features,), (group_rank(tp_group) * own,))
        self.register_shard("weight", nn.Parameter(torch.empty(own, dtype=dtype, device=device)), shard)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 1."""
        nn.init.ones_(self.weight)


def normalise_all_heads(
    query: torch.Tensor, key: torch.Tensor, query_norm: AllHeadsRMSNorm, key_norm: AllHeadsRMSNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise query [S, B, N / R, D] and key [S, B, G / R, D] over all heads of each; return the same shapes.

    Communication: with R > 1 one all-reduce of 8 bytes a token in forward, and one in backward.
    Memory: on one rank as ops.rms_norm; on several ranks float32 copies of both.
    """
    group, pairs = query_norm.tp_group, ((query, query_norm), (key, key_norm))
    if group_size(group) == 1:
        q, k = (ops.rms_norm(x.flatten(2), norm.weight, norm.eps).view(x.shape) for x, norm in pairs)
        return q, k
    wide = [x.flatten(2).float() for x, _ in pairs]
    squares = torch.stack([x.square().sum(-1) for x in wide], -1)
    # Each rank uses the sums for its own features: their gradients are sums over the ranks, too.
    squares = identity_all_reduce(all_reduce_identity(squares, group), group)
    results = []
    for x, (like, norm), square in zip(wide, pairs, squares.unbind(-1), strict=True):
        scale = torch.rsqrt(square / norm.features + norm.eps).unsqueeze(-1)
        results.append((x * scale * norm.weight.float()).to(like.dtype).view(like.shape))
    return results[0], results[1]
