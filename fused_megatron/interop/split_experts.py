"""Parallel replacement for the experts of transformers' models; the routes of the model's own router are kept."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fused_megatron.checks import InputError, check_divisible
from fused_megatron.collectives import (
    Group,
    all_gather_split,
    all_reduce_identity,
    group_rank,
    group_size,
    identity_all_reduce,
    meet,
    split_all_gather,
)
from fused_megatron.expert_parallel import ExpertMLP
from fused_megatron.interop.known_experts import WEIGHTS, ExpertSizes, expert_sizes
from fused_megatron.mesh import Mesh
from fused_megatron.overlap import chunk_choice
from fused_megatron.sharding import ParameterShard, ShardedModule, ShardPart


@dataclass(frozen=True)
class ExpertSplit:
    """The ranks over which experts are split.

    Attributes:
        tp_group: ranks that have the same tokens. Without ep_group and etp_group they share each expert.
        ep_group: ranks that have other experts; tokens move to them.
        etp_group: ranks that share each expert, and exchange their tokens.
        all_groups: ep_group and etp_group together.
    """

    tp_group: Group = None
    ep_group: Group = None
    etp_group: Group = None
    all_groups: Group = None

    @property
    def num_expert_ranks(self) -> int:
        """Number of ranks in ep and etp together."""
        return group_size(self.ep_group) * group_size(self.etp_group)

    @property
    def sizes_text(self) -> str:
        """The sizes of ep and etp that are above 1, for messages."""
        sizes = {"expert_parallel_size": self.ep_group, "expert_tensor_parallel_size": self.etp_group}
        return ", ".join(f"{name}={group_size(group)}" for name, group in sizes.items() if group_size(group) > 1)

    @property
    def moves_tokens(self) -> bool:
        """Whether tokens move to the ranks of their experts."""
        return self.num_expert_ranks > 1

    @property
    def ffn_group(self) -> Group:
        """The ranks that share each expert."""
        return self.etp_group if self.moves_tokens else self.tp_group

    @property
    def size(self) -> int:
        """Number of ranks that hold the experts of a layer together."""
        return group_size(self.ep_group) * group_size(self.ffn_group)


def expert_split_of(mesh: Any, tp_group: Group) -> ExpertSplit:
    """Return the ranks over which a mesh splits experts.

    Communication: creates the group of ep and etp if both are longer than 1; all ranks must call at once.
    """
    if not isinstance(mesh, Mesh):
        return ExpertSplit(tp_group)
    return ExpertSplit(tp_group, mesh["ep"].group, mesh["etp"].group, mesh["ep", "etp"].group)


class ParallelExperts(ShardedModule):
    """The experts of a layer, split over ranks; takes the place of experts of transformers.

        y[t] = sum_k weights[t, k] * (act(x[t] @ gate_e.T) * (x[t] @ up_e.T)) @ down_e.T,   e = experts[t, k]

    Over the tp ranks each expert's F is split, and the results are summed:

        gate_up_proj [E 2 F / R, H], down_proj [E H, F / R]
        forward      y = sum over ranks of y_partial;  backward  dx, dweights: sums over ranks

    With expert parallelism whole experts (or shards of F / etp) are on other ranks, and tokens move to them and back.
    Ranks of tp have the same tokens: each takes its block of them first, and the results are gathered:

        gate_up_proj [E / ep 2 F / etp, H], down_proj [E / ep H, F / etp]
        forward      x block of rows -> dispatch -> products -> combine -> all rows

    Gradients of experts include the tokens of all ranks of ep and etp.

    Args:
        old: experts that experts_obstacle does not refuse.
        ranks: the ranks.
        overlap: as in ExpertMLP.

    Raises:
        InputError: sizes that the numbers of ranks do not divide.

    Communication: over tp one all-reduce of y [T, H] in forward; in backward all-reduces of dx and dweights. With
        expert parallelism as ExpertMLP; with tp also all-gathers of y in forward, of dx and dweights in backward.
    Memory: as ExpertMLP.
    """

    def __init__(self, old: Any, ranks: ExpertSplit, overlap: bool | int = True) -> None:
        super().__init__()
        sizes = expert_sizes(old)
        _check_sizes(sizes, ranks)
        self.tp_group, self.ep_group, self.etp_group = ranks.tp_group, ranks.ep_group, ranks.etp_group
        self.ranks = ranks
        # Experts that the tp ranks share are sharded as dense layers are.
        self.holds_experts = ranks.moves_tokens
        self.num_experts, self.hidden_dim, self.intermediate_dim = sizes[:3]
        dtype = old.down_proj.dtype
        # In a list, so that it is no submodule: both have the same weights.
        self._core = [_core(sizes, ranks, overlap, dtype)]
        ffn, hidden = sizes.ffn_size, sizes.hidden_size
        shapes = ((2 * ffn, hidden), (hidden, ffn))
        self.stored_shapes = {name: (sizes.num_experts, *shape) for name, shape in zip(WEIGHTS, shapes, strict=True)}
        for name, width, parts in zip(WEIGHTS, (sizes.hidden_size, self.ffn_shard), self._parts(sizes), strict=True):
            values = torch.empty((parts[-1].rows.stop, width), device="meta", dtype=dtype)
            self.register_shard(name, nn.Parameter(values), parts)

    @property
    def ffn_shard(self) -> int:
        """Features of each expert on this rank."""
        return self.intermediate_dim // group_size(self.ranks.ffn_group)

    @property
    def own_experts(self) -> range:
        """The experts of this rank."""
        count = self.num_experts // group_size(self.ranks.ep_group)
        first = group_rank(self.ranks.ep_group) * count
        return range(first, first + count)

    def connect(self, like: torch.Tensor) -> None:
        """Let the ranks of ep and etp meet and measure their exchanges now, and not in a forward; all must call."""
        for group in (self.ep_group, self.etp_group) if like.is_cpu else ():
            meet(group)
        chunk_choice(self._core[0].overlap).measured(self.ep_group, like)

    def _parts(self, sizes: ExpertSizes) -> tuple[tuple[ShardPart, ...], tuple[ShardPart, ...]]:
        """Return the stacked parts of both weights, with the names that ExpertMLP gives."""
        rows, hidden, full = self.ffn_shard, sizes.hidden_size, sizes.ffn_size
        start = group_rank(self.ranks.ffn_group) * rows
        expansion: list[ShardPart] = []
        projection: list[ShardPart] = []
        for expert in self.own_experts:
            for name in ("gate", "up"):
                block = slice(len(expansion) * rows, (len(expansion) + 1) * rows)
                expansion.append(ShardPart(f"{expert}.{name}", block, ParameterShard((full, hidden), (start, 0))))
            block = slice(len(projection) * hidden, (len(projection) + 1) * hidden)
            projection.append(ShardPart(f"{expert}", block, ParameterShard((hidden, full), (0, start))))
        return tuple(expansion), tuple(projection)

    @torch.compiler.disable(reason="a collective of fused_megatron")
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return y [T, H] of tokens [T, H] with experts [T, K] and weights [T, K]; T may differ between ranks of ep."""
        core = self._core[0]
        for name, own in zip(("expansion_weight", "projection_weight"), WEIGHTS, strict=True):
            core._parameters[name] = self._parameters[own]
        group = self.tp_group
        if not self.ranks.moves_tokens:
            x, weights = identity_all_reduce(hidden_states, group), identity_all_reduce(top_k_weights.float(), group)
            return all_reduce_identity(core(x, top_k_index, weights), group)
        num_tokens = hidden_states.shape[0]
        # tp ranks have the same tokens. A token is sent to its experts by one of them.
        x, experts, weights = (
            split_all_gather(F.pad(t, (0, 0, 0, -num_tokens % group_size(group))), 0, group)
            for t in (hidden_states, top_k_index, top_k_weights.float())
        )
        return all_gather_split(core(x, experts, weights), 0, group)[:num_tokens]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self.ranks)] = self.ranks  # process groups cannot be copied; both use the same
        return super().__deepcopy__(memo)

    def extra_repr(self) -> str:
        """Describe the layer for print(model)."""
        own, ranks = self.own_experts, self.ranks
        return (
            f"num_experts={self.num_experts}, hidden_dim={self.hidden_dim}, intermediate_dim={self.intermediate_dim}, "
            f"own_experts={own.start}..{own.stop - 1}, own_features={self.ffn_shard}, "
            f"expert_parallel_size={group_size(ranks.ep_group)}"
        )


def expert_split(model: nn.Module) -> ExpertSplit:
    """Return the ranks over which the experts of a model are split; no ranks if they are not."""
    found = (module.ranks for module in model.modules() if isinstance(module, ParallelExperts))
    return next(found, ExpertSplit())


def _core(sizes: ExpertSizes, ranks: ExpertSplit, overlap: bool | int, dtype: torch.dtype) -> ExpertMLP:
    """Return what computes this rank's experts. Over tp it sees this rank's features of the experts only."""
    with torch.random.fork_rng(devices=[]):  # initial values are dropped: they must not advance the caller's generator
        return ExpertMLP(
            sizes.num_experts,
            sizes.hidden_size,
            sizes.ffn_size if ranks.moves_tokens else sizes.ffn_size // group_size(ranks.ffn_group),
            activation=sizes.activation,
            bias=False,
            ep_group=ranks.ep_group,
            etp_group=ranks.etp_group,
            overlap=overlap,
            device="meta",
            dtype=dtype,
        )


def _check_sizes(sizes: ExpertSizes, ranks: ExpertSplit) -> None:
    check_divisible("num_experts", sizes.num_experts, "expert_parallel_size", group_size(ranks.ep_group))
    name = "expert_tensor_parallel_size" if ranks.moves_tokens else "tensor_parallel_size"
    try:
        check_divisible("the experts' intermediate size", sizes.ffn_size, name, group_size(ranks.ffn_group))
    except InputError as error:
        way_out = "" if ranks.moves_tokens else "; or plan={.., 'experts': 'replicate'}"
        raise InputError(f"{error}{way_out}") from None


__all__ = ["ExpertSplit", "ParallelExperts", "expert_split", "expert_split_of"]
