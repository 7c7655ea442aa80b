"""Feed-forward experts of a mixture-of-experts layer, divided over ranks by expert and by width."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fused_megatron.checks import (
    InputError,
    check_divisible,
    check_dtype,
    check_one_of,
    check_positive,
    check_same_device,
    check_shape,
    has_values,
)
from fused_megatron.collectives import Group, group_rank, group_size, meet, on_ranks
from fused_megatron.config.parallel import cheapest_dispatch
from fused_megatron.expert_parallel.all_to_all import SentTokens
from fused_megatron.expert_parallel.dispatch import (
    CollectResults,
    GatheredTokens,
    LocalTokens,
    RankExchange,
    SendTokens,
)
from fused_megatron.expert_parallel.expert_part import ExpertShapes
from fused_megatron.expert_parallel.expert_products import ExpertFunction, TokenExchange
from fused_megatron.expert_parallel.route_counts import (
    RouteCounts,
    assumed_counts,
    equal_counts,
    first_error,
    gather_counts,
)
from fused_megatron.expert_parallel.token_order import TableOrder, counts_for, fill_slots
from fused_megatron.expert_parallel.weighted_activation import ACTIVATIONS, GATED
from fused_megatron.ops.expert_permutation import ExpertOrder, order_by_expert
from fused_megatron.overlap import chunk_choice
from fused_megatron.overlap.overlapped_linear import autocast_operands
from fused_megatron.sharding import ParameterShard, ShardedModule, ShardPart, fill_normal_shard_

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DISPATCHES = ("all_to_all", "all_gather")
"""Ways to bring tokens to their experts."""


class ExpertMLP(ShardedModule):
    """E two-layer MLPs, of which each token passes through K: the experts of a mixture-of-experts layer.

    Expert e computes, of the tokens that chose it,

        h_e [n, F'] = x_e @ expansion_e.T + expansion_bias_e
        y_e [n, H]  = activation(h_e) @ projection_e.T + projection_bias_e

    and y of a token is the sum over its K experts of probability * y_e. Rank i of ep_group has the experts
    [i E / ep, (i + 1) E / ep); the ranks of etp_group divide the width F of each. Every rank brings tokens of its own,
    any number, and gets their results.

        expansion_weight   [E / ep x F' / etp, H]    for each local expert the rows [gate | up] (plain: its rows)
        projection_weight  [E / ep x H, F / etp]     for each local expert its H rows
        expansion_bias     [E / ep x F' / etp], projection_bias [E / ep x H]

    Args:
        num_experts: E over all ranks; ep divides it.
        hidden_size: H.
        ffn_size: F of one expert; etp divides it.
        activation: "swiglu" or "geglu" (gated), "gelu" or "gelu_exact".
        bias: whether both products have a bias.
        ep_group: the ep ranks that share the experts; None for this rank only.
        etp_group: the etp ranks that share each expert; None for this rank only.
        dispatch: "all_to_all": each token is sent to the ranks of its experts; "all_gather": every rank gets all tokens
            and returns its part of their sums. None: the way that sends fewer bytes (cheapest_dispatch).
        overlap: number of parts of the experts of a rank, so that the exchange of one part runs under the products of
            another: True lets the cost model of ep_group choose (all ranks measure now), a number fixes it, False is 1.
        init_std, output_init_std: standard deviation of the initial weights of expansion and projection (None: the
            same). The full weights are the same for every ep and etp.
        dtype, device: of the parameters.

    Attributes:
        assumed_routes: routes of tensors without values, in a dry run: "balanced", or "worst" for this rank.

    Raises:
        InputError: ep does not divide E, etp does not divide F, an unknown activation or dispatch.
    """

    holds_experts = True
    assumed_routes: str = "balanced"
    expansion_weight: nn.Parameter
    projection_weight: nn.Parameter
    expansion_bias: nn.Parameter | None
    projection_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        ffn_size: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        ep_group: Group = None,
        etp_group: Group = None,
        dispatch: str | None = None,
        overlap: bool | int = True,
        init_std: float = 0.02,
        output_init_std: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_one_of("activation", activation, tuple(ACTIVATIONS))
        if dispatch is not None:
            check_one_of("dispatch", dispatch, DISPATCHES)
        for name, value in (("num_experts", num_experts), ("hidden_size", hidden_size), ("ffn_size", ffn_size)):
            check_positive(name, value)
        ep, etp = group_size(ep_group), group_size(etp_group)
        check_divisible("num_experts", num_experts, "expert_parallel_size", ep)
        check_divisible("expert_ffn_hidden_size", ffn_size, "expert_tensor_parallel_size", etp)
        self.num_experts, self.hidden_size, self.ffn_size = num_experts, hidden_size, ffn_size
        self.activation, self.gated, self.dispatch = activation, activation in GATED, dispatch
        self.ep_group, self.etp_group, self.tp_group = ep_group, etp_group, etp_group
        self.overlap = overlap
        self.init_std = init_std
        self.output_init_std = init_std if output_init_std is None else output_init_std
        self.num_local_experts = num_experts // ep
        self._register(bias, dtype, device)
        like = self.expansion_weight[:0]
        if like.is_cpu:
            for group in (ep_group, etp_group):
                meet(group)
        chunk_choice(overlap).measured(ep_group, like)
        self.reset_parameters()

    def _register(self, bias: bool, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        """Make the parameters and record the part of each full weight that they hold."""
        etp, etp_rank = group_size(self.etp_group), group_rank(self.etp_group)
        hidden, full, width = self.hidden_size, self.ffn_size, self.ffn_size // etp
        expansion: list[ShardPart] = []
        expansion_bias: list[ShardPart] = []
        projection: list[ShardPart] = []
        projection_bias: list[ShardPart] = []
        for index, expert in enumerate(self.local_experts):
            row = index * hidden
            rows = slice(row, row + hidden)
            shard = ParameterShard((hidden, full), (0, etp_rank * width))
            projection.append(ShardPart(f"{expert}", rows, shard))
            projection_bias.append(ShardPart(f"{expert}", rows, ParameterShard((hidden,), (0,), replicated=True)))
            for part in ("gate", "up") if self.gated else ("",):
                start = len(expansion) * width
                name, rows = f"{expert}.{part}".rstrip("."), slice(start, start + width)
                shard = ParameterShard((full, hidden), (etp_rank * width, 0))
                expansion.append(ShardPart(name, rows, shard))
                expansion_bias.append(ShardPart(name, rows, ParameterShard((full,), (etp_rank * width,))))
        rows_in, rows_out = len(expansion) * width, self.num_local_experts * hidden
        made: list[tuple[str, tuple[int, ...], list[ShardPart]]] = [
            ("expansion_weight", (rows_in, hidden), expansion),
            ("projection_weight", (rows_out, width), projection),
        ]
        if bias:
            made += [("expansion_bias", (rows_in,), expansion_bias), ("projection_bias", (rows_out,), projection_bias)]
        else:
            self.register_parameter("expansion_bias", None)
            self.register_parameter("projection_bias", None)
        for name, shape, parts in made:
            self.register_shard(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)), tuple(parts))

    @property
    def local_experts(self) -> range:
        """The experts of this rank."""
        first = group_rank(self.ep_group) * self.num_local_experts
        return range(first, first + self.num_local_experts)

    def reset_parameters(self, seed: int | None = None, name: str = "") -> None:
        """Draw the weights from (seed, name), or from torch's CPU generator; biases become 0.

        Args:
            seed: seed of the model. None: torch's CPU generator must have the same state on all ranks of ep_group and
                etp_group (torch.manual_seed).
            name: name of this module in the model.
        """
        self.mark_shards()
        if not has_values(self.expansion_weight):
            return
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        for own, std in (("expansion_weight", self.init_std), ("projection_weight", self.output_init_std)):
            fill_normal_shard_(self.get_parameter(own), std, seed=seed, name=f"{name}.{own}".lstrip("."))
        for bias in (self.expansion_bias, self.projection_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        probabilities: torch.Tensor,
        *,
        keep: torch.Tensor | None = None,
        slots: int | None = None,
        meanwhile: Callable[[], torch.Tensor] | None = None,
    ) -> Any:
        """Send each token to its experts, and return the weighted sum of their results.

        Args:
            x: [T, H] float, the tokens of this rank; T may be 0, and may differ between ranks.
            experts: [T, K] int64, the experts of each token, all different.
            probabilities: [T, K] float32, the weight of each of them.
            keep: [T, K] bool; False for a pair of token and expert that is dropped: it is not sent and adds nothing.
            slots: number of rows that each rank sends to each expert; further ones are dropped, missing ones are
                padded. Then all shapes are fixed, and the host reads nothing; with all_gather every rank must have the
                same number of tokens. None: as many as there are.
            meanwhile: runs between the start of the dispatch and its end (a shared expert); its result is returned.

        Returns:
            y [T, H] in the dtype of x, or (y, meanwhile()).

        Raises:
            SharedInputError: shapes or experts of some rank are wrong; with slots, or on one rank, an InputError.
            SharedFailure: a dtype of some rank is wrong; with slots, or on one rank, a TypeError.

        Communication: over ep_group and etp_group as cheapest_dispatch says; besides, without slots, the
            numbers of rows, 8 (E + 2) bytes a rank, for which the host waits.
        Memory: all_to_all keeps the rows [N, H] that arrive, all_gather the tokens of all ranks, one rank x; all keep h
            [N, F' / etp] and 20 bytes a row, all_to_all 16 more.
        Numerics: sums over experts are in float32 in the order of k, sums over ranks in rank order: bitwise repeatable.
        """
        if torch.compiler.is_compiling():
            return _between_graphs(self, x, experts, probabilities, keep, slots, meanwhile)
        return self._forward(x, experts, probabilities, keep, slots, meanwhile)

    def _forward(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        probabilities: torch.Tensor,
        keep: torch.Tensor | None,
        slots: int | None,
        meanwhile: Callable[[], torch.Tensor] | None,
    ) -> Any:
        if slots is not None and x.shape[0] == 0:  # slots need a row to be filled with
            x, experts, probabilities = (F.pad(each, (0, 0, 0, 1)) for each in (x, experts, probabilities))
            keep = torch.zeros_like(experts, dtype=torch.bool)
            y = self._forward(x, experts, probabilities, keep, slots, meanwhile)
            return y[:0] if meanwhile is None else (y[0][:0], y[1])
        x, *weights = self._cast(x)
        shapes = ExpertShapes(
            self.num_local_experts, ACTIVATIONS[self.activation], adds_bias=group_rank(self.etp_group) == 0
        )
        exchange = self._exchange(x, experts, probabilities, keep, slots)
        if not isinstance(exchange, RankExchange):
            other = None if meanwhile is None else meanwhile()
            y = ExpertFunction.apply(x, probabilities, *weights, shapes, exchange)
            return y if meanwhile is None else (y, other)
        group = self.ep_group or self.etp_group
        ticket = on_ranks(SendTokens, group)(x, probabilities, exchange)
        other = None if meanwhile is None else meanwhile()
        ticket = on_ranks(ExpertFunction, group)(ticket, None, *weights, shapes, exchange)
        y = on_ranks(CollectResults, group)(ticket, exchange)
        return y if meanwhile is None else (y, other)

    def _exchange(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        probabilities: torch.Tensor,
        keep: torch.Tensor | None,
        slots: int | None,
    ) -> TokenExchange:
        """Return the way of the tokens to their experts and back."""

        def check_input() -> None:
            self._check(x, experts, probabilities, keep, slots)

        groups = self.ep_group, self.etp_group
        ranks, error = group_size(self.ep_group) * group_size(self.etp_group), first_error(check_input)
        if error is not None:
            if ranks > 1 and slots is None:
                gather_counts(None, 0, self.num_experts, groups, check_input)
            raise error
        kept = experts if keep is None else experts.masked_fill(~keep, -1)
        order, filled = order_by_expert(kept, self.num_experts), None
        if slots is not None:
            counts = equal_counts(slots, x.shape[0], self.num_experts, groups)
            if ranks == 1 or self._dispatch(experts) == "all_to_all":
                order, filled = fill_slots(kept, order, slots)
        elif ranks == 1 and keep is None and not x.is_cpu:
            # A device has the numbers of rows, and their sum is known.
            return LocalTokens(TableOrder(0, self.num_experts, order.counts, experts.numel(), order))
        elif not has_values(experts):
            num_tokens, num_selected = experts.shape
            counts = assumed_counts(self.assumed_routes, num_tokens, num_selected, self.num_experts, groups)
        else:
            counts = gather_counts(order.counts, x.shape[0], self.num_experts, groups, check_input)
        num_rows = int(counts.sent.sum())
        order = ExpertOrder(order.rows[:num_rows], order.places, order.counts)
        if ranks == 1:
            sent = counts_for(counts.sent.tolist(), x.device)
            return LocalTokens(TableOrder(0, self.num_experts, sent, num_rows, order, filled))
        if self._dispatch(experts) == "all_gather":
            return GatheredTokens(kept, counts, *groups, slots)
        return SentTokens(order, filled, counts, self._num_parts(x, counts), *groups)

    def _dispatch(self, experts: torch.Tensor) -> str:
        return self.dispatch or cheapest_dispatch(
            group_size(self.ep_group), group_size(self.etp_group), experts.shape[1]
        )

    def _num_parts(self, x: torch.Tensor, counts: RouteCounts) -> int:
        """Return the number of parts of the experts, so that exchanges run under products; the same on every rank."""
        most = int(counts.rows.reshape(-1, counts.ep, counts.num_local).sum((0, 2)).max())
        weight_elements = (self.expansion_weight.numel() + self.projection_weight.numel()) // self.num_local_experts
        number = chunk_choice(self.overlap).for_exchange(x, most, weight_elements, self.ep_group)
        return min(number, self.num_local_experts)

    def _cast(self, x: torch.Tensor) -> tuple[Any, ...]:
        """Return x and the parameters, in the dtype of autocast where it is enabled."""
        x_cast, expansion, expansion_bias = autocast_operands(x, self.expansion_weight, self.expansion_bias)
        _, projection, projection_bias = autocast_operands(x, self.projection_weight, self.projection_bias)
        return x_cast, expansion, expansion_bias, projection, projection_bias

    def _check(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        probabilities: torch.Tensor,
        keep: torch.Tensor | None,
        slots: int | None,
    ) -> None:
        if x.dim() != 2:
            raise InputError(f"x.shape={tuple(x.shape)} must be (tokens, hidden_size={self.hidden_size})")
        check_shape("x", x, (x.shape[0], self.hidden_size))
        is_cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        check_dtype("x", x, FLOATS if is_cast else (self.expansion_weight.dtype,))
        check_same_device("x", x, "expansion_weight", self.expansion_weight)
        if experts.dim() != 2:
            raise InputError(f"experts.shape={tuple(experts.shape)} must be (tokens, experts_per_token)")
        check_shape("experts", experts, (x.shape[0], experts.shape[1]))
        check_dtype("experts", experts, (torch.int64,))
        check_shape("probabilities", probabilities, experts.shape)
        check_dtype("probabilities", probabilities, (torch.float32,))
        for name, tensor in (("experts", experts), ("probabilities", probabilities)):
            check_same_device(name, tensor, "x", x)
        if keep is not None:
            check_shape("keep", keep, experts.shape)
            check_dtype("keep", keep, (torch.bool,))
        if slots is not None:
            check_positive("slots", slots)
        if experts.is_cpu and has_values(experts) and experts.numel():
            least, most = (int(each) for each in experts.aminmax())
            if not 0 <= least <= most < self.num_experts:
                wrong = least if least < 0 else most
                raise InputError(f"experts has {wrong}; it must have numbers from 0 to {self.num_experts - 1}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        for group in (self.ep_group, self.etp_group):
            memo[id(group)] = group  # a process group cannot be copied
        return super().__deepcopy__(memo)

    def extra_repr(self) -> str:
        """Return the text for print(model)."""
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, ffn_size={self.ffn_size}, "
            f"activation={self.activation}, bias={self.expansion_bias is not None}, "
            f"expert_parallel_size={group_size(self.ep_group)}, "
            f"expert_tensor_parallel_size={group_size(self.etp_group)}"
        )


@torch._disable_dynamo  # torch.compile cannot trace collectives that run under products
def _between_graphs(layer: ExpertMLP, *args: Any) -> Any:
    return layer._forward(*args)
