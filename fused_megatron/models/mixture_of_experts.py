"""Mixture of experts: the feed-forward in which a router selects some of many expert MLPs for each token."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from fused_megatron.collectives import (
    Group,
    all_gather_split,
    all_reduce_identity,
    group_rank,
    group_size,
    split_all_gather,
)
from fused_megatron.collectives.transfers import start_all_reduce_
from fused_megatron.config import TransformerConfig
from fused_megatron.expert_parallel import ExpertMLP
from fused_megatron.mesh import ParallelLayout
from fused_megatron.models.dropout import DropoutMasks
from fused_megatron.models.expert_capacity import kept_pairs
from fused_megatron.models.parallel_mlp import ParallelMLP
from fused_megatron.models.router import ExpertRouter, float32_product
from fused_megatron.modules.auxiliary_loss import WithAuxiliaryLoss
from fused_megatron.ops.expert_routing import Routes
from fused_megatron.sharding import SequenceLayout, SequencePartition, fill_normal_shard_, used_by_parts


class MixtureOfExperts(nn.Module):
    """Mixture of experts: y = sum over the K selected experts of probability x expert(x), + shared(x).

    x [S, B, H] -> routes of the tokens of this rank -> ExpertMLP -> [S, B, H]. Every token is on one rank: under
    sequence parallelism each tensor-parallel rank has its block of the sequence. Without it each takes a block of
    ceil(S / R) positions of x, the last ones shorter, and the results are gathered.

    Args:
        config: sizes and options.
        layout: how the layer is cut over ranks; under sequence parallelism x and the result are sequence shards
            [S / R, B, H].
        dtype, device: of the parameters. The router computes in float32.

    Raises:
        InputError: as ExpertMLP and ParallelMLP.

    Communication:
        As ExpertMLP and, for shared experts, ParallelMLP. With R > 1 and without sequence parallelism one all-gather of
        S B H elements forward and one backward. In training: with an auxiliary loss, one all-reduce of 16 B E + 8 bytes
        over the tensor-parallel ranks and one of 8 B E bytes over the context-parallel ranks forward; the router's.
        With config.capacity_factor as kept_pairs.

    Memory: as ExpertRouter, ExpertMLP and ParallelMLP.

    Papers: Shazeer et al. 2017 (arXiv:1701.06538); Fedus et al. 2021, Switch (arXiv:2101.03961); Zoph et al. 2022,
    ST-MoE (arXiv:2202.08906); DeepSeek-AI 2024, DeepSeek-V3 (arXiv:2412.19437).
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layout: ParallelLayout,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        assert config.num_experts is not None
        self.config, self.layout = config, layout
        self.tp_group = layout.tp_group
        self.cuts_sequence = group_size(layout.tp_group) > 1 and not layout.sequence_parallel
        self.router = ExpertRouter(config, tp_group=layout.tp_group, dtype=dtype, device=device)
        self.experts = ExpertMLP(
            config.num_experts,
            config.hidden_size,
            config.expert_ffn_size,
            activation=config.activation,
            bias=config.linear_biases,
            ep_group=layout.ep_group,
            etp_group=layout.etp_group,
            dispatch=layout.expert_dispatch,
            overlap=layout.overlap,
            init_std=config.init_std,
            output_init_std=config.output_init_std,
            dtype=dtype,
            device=device,
        )
        self.shared = self.shared_gate = None
        if config.num_shared_experts:
            shared = replace(config, ffn_hidden_size=config.shared_ffn_size)
            self.shared = ParallelMLP(shared, layout=layout, dtype=dtype, device=device)
        if config.shared_expert_gate:
            self.shared_gate = SharedExpertGate(config, layout=layout, dtype=dtype, device=device)

    def forward(
        self,
        x: torch.Tensor,
        *,
        dropout: DropoutMasks | None = None,
        partition: SequencePartition | None = None,
    ) -> tuple[torch.Tensor, None] | WithAuxiliaryLoss:
        """Return (y, None), y of the shape of x; in training with the auxiliary loss and the report of the router.

        Args:
            x: activations [S, B, H], or [S / R, B, H] under sequence parallelism.
            dropout: the random state of the router's noise; None: no noise.
            partition: the positions of each context-parallel rank; the rows of x are this rank's positions. None: x has
                all positions.
        """
        own = _own_block(x, self.tp_group) if self.cuts_sequence else x
        rows = x.shape[0] if self.cuts_sequence else x.shape[0] * group_size(self.tp_group)
        noise = None
        if dropout is not None and self.router.jitter > 0:
            noise = self.router.noise(dropout, 0, self._positions(dropout.sequence, own.shape[0]), own.shape)
        routes = self.router(own, noise)
        keep = self._keep(routes, own.shape, rows, partition)
        slots = self._fixed_slots(own, partition)
        meanwhile = self._shared(x)
        returned = self.experts(
            own.flatten(0, 1), routes.experts, routes.probabilities.float(), keep=keep, slots=slots, meanwhile=meanwhile
        )
        y, shared = (returned, None) if meanwhile is None else returned
        y = y.view(own.shape)
        if self.cuts_sequence:
            y = _all_blocks(y, x.shape[0], self.tp_group)
        y = y if shared is None else y + shared
        if not (self.training and torch.is_grad_enabled()):
            return y, None
        return WithAuxiliaryLoss((y, None), *self._losses(routes, keep, rows, partition))

    def _positions(self, sequence: SequenceLayout, rows: int) -> SequenceLayout:
        """Return the positions of the rows of _own_block."""
        if not self.cuts_sequence:
            return sequence
        first = group_rank(self.tp_group) * -(-sequence.num_positions // group_size(self.tp_group))
        return sequence.rows(first, first + rows)

    def _shared(self, x: torch.Tensor) -> Callable[[], torch.Tensor] | None:
        """Return the computation of the shared experts; None without shared experts."""
        shared, gate = self.shared, self.shared_gate
        if shared is None:
            return None
        return lambda: shared(x) if gate is None else gate(x) * shared(x)

    def _keep(
        self, routes: Routes, shape: torch.Size, rows: int, partition: SequencePartition | None
    ) -> torch.Tensor | None:
        """Return which pairs [T, K] stay within the capacity of the experts; None if all stay."""
        slots = self.config.slots(rows if partition is None else partition.seq_len)
        if slots is None:
            return None
        kept = kept_pairs(
            routes.experts.view(*shape[:2], self.config.experts_per_token),
            slots,
            self.router.num_experts,
            rows=rows,
            tp_group=self.tp_group,
            cp_group=self.layout.cp_group,
            partition=partition,
        )
        return kept.flatten(0, 1)

    def _fixed_slots(self, x: torch.Tensor, partition: SequencePartition | None) -> int | None:
        """Return the number of rows that every rank sends to each expert, so that the host need not wait for numbers.

        None on a CPU; without a capacity; and where ranks share sequences: each would pad to the slots of all of them.
        """
        shares = group_size(self.tp_group) > 1 or (partition is not None and group_size(self.layout.cp_group) > 1)
        if shares or not host_waits_for(x):
            return None
        slots, (rows, batch, _) = self.config.slots(x.shape[0]), x.shape
        return None if slots is None else min(batch * slots, batch * rows)

    def _losses(
        self, routes: Routes, keep: torch.Tensor | None, rows: int, partition: SequencePartition | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the auxiliary loss of the microbatch (None if its coefficients are 0), and this rank's report.

        The loss is equal on all tensor-parallel ranks, and each context-parallel rank has a share of it. The entries of
        the report are those of ExpertRouter.sums.
        """
        config, router = self.config, self.router
        ranks = group_size(self.tp_group)
        balance = z = routes.score_sums.new_zeros((), dtype=torch.float64)
        if config.has_auxiliary_loss:
            # A copy, since the counts of this rank are reported.
            counts = routes.counts.double()
            sums = torch.cat([counts.flatten(), routes.score_sums.double().flatten(), routes.z.double().view(1)])
            sums = all_reduce_identity(sums, self.tp_group)
            counts, score_sums, z_sum = sums.split([counts.numel(), counts.numel(), 1])
            balance = config.balance_loss * self._balance(
                counts.detach().view(routes.counts.shape), score_sums.view(routes.counts.shape), rows, partition
            )
            z = config.router_z_loss * z_sum.squeeze(0)
        loads = routes.counts.sum(0).double()
        dropped = loads.new_zeros(()) if keep is None else (~keep).sum().double()
        report = torch.cat([loads, torch.stack([balance.detach() / ranks, z.detach() / ranks, dropped])])
        assert report.shape == router.sums.shape
        return balance + z if config.has_auxiliary_loss else None, report

    def _balance(
        self, counts: torch.Tensor, score_sums: torch.Tensor, rows: int, partition: SequencePartition | None
    ) -> torch.Tensor:
        """Return this rank's share of the balance loss, without its coefficient: 1 a token where loads are even.

        Per sequence of S tokens: E / (K S) sum_e counts[e] score_sums[e], with counts over the whole sequence. Over the
        previous step, with its share l[e] of the pairs: E sum_e l[e] score_sums[e].

        Args:
            counts: [B, E] float64, tokens of each expert by sequence, over the tensor-parallel ranks.
            score_sums: [B, E] float64, sums of scores over the tokens of these ranks.
            rows: tokens of a sequence on these ranks.
            partition: as in forward().
        """
        experts = self.router.num_experts
        previous = self.router.previous_load
        if previous is not None:
            load = previous.double()
            total = load.sum()
            share = torch.where(total > 0, load / total.clamp(min=1.0), 1.0 / experts)
            return experts * (share * score_sums).sum()
        seq_len = rows
        if partition is not None and group_size(self.layout.cp_group) > 1:
            counts = start_all_reduce_(counts.clone(), self.layout.cp_group).wait()
            seq_len = partition.seq_len
        return experts / (self.config.experts_per_token * seq_len) * (counts * score_sums).sum()


class SharedExpertGate(nn.Module):
    """Gate of the shared experts: sigmoid(x weight^T), computed in float32; weight [1, H] is whole on every rank."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        layout: ParallelLayout,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.init_std = config.init_std
        # Without sequence parallelism every rank has all tokens, and so the whole gradient.
        self.tp_group = layout.tp_group if layout.sequence_parallel else None
        self.weight = nn.Parameter(torch.empty(1, config.hidden_size, dtype=dtype, device=device))

    def reset_parameters(self, seed: int, name: str) -> None:
        """Draw the weight from (seed, name)."""
        fill_normal_shard_(self.weight, self.init_std, seed=seed, name=name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the factors [S, B, 1] of x [S, B, H], in the dtype of x."""
        (weight,) = used_by_parts((self.weight,), self.tp_group)
        return float32_product(x.flatten(0, 1), weight).sigmoid().to(x.dtype).view(*x.shape[:2], 1)


def host_waits_for(x: torch.Tensor) -> bool:
    """Whether the host waits for a device when it reads a number from the device of x."""
    return not x.is_cpu


def _own_block(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Return this rank's block of ceil(S / R) positions of x [S, B, H]; the last blocks are shorter, or empty."""
    ranks, rank, rows = group_size(group), group_rank(group), x.shape[0]
    size = -(-rows // ranks)
    block = split_all_gather(F.pad(x, (0, 0, 0, 0, 0, size * ranks - rows)), 0, group)
    return block[: max(0, min(size, rows - rank * size))]


def _all_blocks(y: torch.Tensor, rows: int, group: Group) -> torch.Tensor:
    """Return [S, B, H] from the blocks of _own_block; S = rows."""
    size = -(-rows // group_size(group))
    return all_gather_split(F.pad(y, (0, 0, 0, 0, 0, size - y.shape[0])), 0, group)[:rows]
