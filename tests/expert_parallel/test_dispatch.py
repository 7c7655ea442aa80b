"""Start here when tokens do not reach their experts, come back mixed up, or too many bytes or waits carry them."""

from functools import cache
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from fused_megatron.checks import InputError, SharedInputError
from fused_megatron.collectives.together import SharedFailure
from fused_megatron.config.parallel import cheapest_dispatch
from fused_megatron.expert_parallel import ExpertMLP, route_counts
from fused_megatron.mesh import init_mesh
from fused_megatron.ops.expert_permutation import combine_tokens
from fused_megatron.testing import record_communication, run_cases_on_ranks, run_on_ranks
from fused_megatron.testing.drawn_routes import ROUTINGS, draw_routes, ragged_tokens

E, H, WIDTH, T = 8, 6, 10, 32


@cache
def groups(ep, etp):
    mesh = init_mesh(expert_parallel_size=ep, expert_tensor_parallel_size=etp)
    return mesh["ep"].group, mesh["etp"].group


def layer_of(ep, etp, dispatch=None, **options):
    ep_group, etp_group = groups(ep, etp)
    layer = ExpertMLP(
        E,
        H,
        WIDTH,
        ep_group=ep_group,
        etp_group=etp_group,
        dispatch=dispatch,
        init_std=0.5,
        **{"overlap": 1, **options},
    )
    layer.reset_parameters(1, "experts")
    return layer


def through_identities(layer, x, routes, keep, slots):
    """Send tokens through experts that return their input; then send x back the same way, as a gradient."""
    exchange = layer._exchange(x, *routes, keep, slots)
    exchange.start(x, routes.probabilities)
    orders = []
    for part in range(exchange.num_parts):
        table, _ = exchange.arrive(part, x, None)
        orders.append(exchange.order(part))
        exchange.leave(part, combine_tokens(table[orders[part].tokens()], orders[part].pairs))
    exchange.result(x)
    y = exchange.finish()
    exchange.start_back(x)
    for part, order in enumerate(orders):
        table = exchange.arrive_back(part, x)
        of_pairs = torch.ones(order.pairs.places.shape)
        exchange.leave_back(part, combine_tokens(table[order.tokens()], order.pairs), of_pairs)
    return y, exchange.finish_back()[0]


def identity(rank, ranks, ep, etp, routing, dispatch, options):
    tokens = T if options.get("slots") else ragged_tokens(T, ranks)[rank]
    routes = draw_routes(routing, tokens, E, 3, rank=rank // etp, num_ranks=ep, seed=rank)
    x = torch.randint(-9, 9, (tokens, H), generator=torch.Generator().manual_seed(rank)).float()
    keep = torch.rand(routes.experts.shape, generator=torch.Generator().manual_seed(rank)) < 0.6
    kept, slots = keep if options.get("drops") else torch.ones_like(keep), options.get("slots")
    wanted = kept.clone()
    if slots:  # later pairs of an expert are dropped
        left = dict.fromkeys(range(E), slots)
        for token in range(tokens):
            for k, expert in enumerate(routes.experts[token].tolist()):
                if kept[token, k]:
                    wanted[token, k] = left[expert] > 0
                    left[expert] -= 1
    layer = layer_of(ep, etp, dispatch, overlap=options.get("parts", 1))
    y, dx = through_identities(layer, x, routes, kept if options.get("drops") else None, slots)
    expected = x * wanted.sum(1, keepdim=True) * etp  # each shard of an expert returns the whole input
    return y.equal(expected) and dx.equal(expected)


@pytest.mark.parametrize("ep, etp", [(2, 1), (4, 1), (2, 2)])
def test_identity_experts_return_every_token_exactly(ep, etp):
    cases = [
        (ep, etp, routing, dispatch, [{}, {"parts": 2}, {"drops": True}, {"slots": 5}][(i + j) % 4])
        for i, routing in enumerate(ROUTINGS)
        for j, dispatch in enumerate(("all_to_all", "all_gather"))
    ]
    for case, found in zip(cases, run_cases_on_ranks(identity, ep * etp, cases), strict=True):
        assert all(found), case


def traffic(rank, ranks, dispatch):
    layer, routes = layer_of(ranks, 1, dispatch), draw_routes("balanced", T, E, 2, rank=rank, num_ranks=ranks)
    x = torch.randn(T, H, requires_grad=True)
    reads, read = [], route_counts._on_host
    probabilities = routes.probabilities.requires_grad_()
    with (
        record_communication() as ledger,
        mock.patch.object(route_counts, "_on_host", lambda n: reads.append(n) or read(n)),
    ):
        layer(x, routes.experts, probabilities).sum().backward()
    return [(e.kind, e.num_bytes, e.backward) for e in ledger.entries], len(reads)


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_and_waits_of_the_host(ranks):
    for entries, reads in run_on_ranks(traffic, ranks, "all_to_all"):
        assert reads == 1
        numbers = [("all_gather", ranks * (E + 2) * 8, False)]
        rows = T * 2 * H * 4 * (ranks - 1) // ranks
        weights = T * 2 * 4 * (ranks - 1) // ranks
        # 2 x top-k x tokens x H x (1 - 1 / ep) x element size in each direction, and 4 bytes a row for the weights.
        forward = [("all_to_all", size, False) for size in (rows, weights, rows)]
        assert entries == numbers + forward + [("all_to_all", size, True) for size in (rows, rows, weights)]
    for entries, reads in run_on_ranks(traffic, ranks, "all_gather"):
        assert reads == 1
        table, routes = ranks * T * H * 4, ranks * T * 2 * 8
        gathers = [("all_gather", size, False) for size in (ranks * (E + 2) * 8, routes, table)]
        forward = [*gathers, ("reduce_scatter", table, False), ("all_gather", table, True)]
        assert entries == [*forward, ("reduce_scatter", table, True), ("reduce_scatter", ranks * T * 2 * 4, True)]


def test_the_rule_takes_the_way_with_fewer_bytes():
    assert [cheapest_dispatch(ep, 1, 2) for ep in (1, 2, 4)] == ["all_to_all"] * 3
    assert cheapest_dispatch(4, 1, 8) == cheapest_dispatch(1, 2, 2) == cheapest_dispatch(4, 2, 8) == "all_gather"
    assert cheapest_dispatch(8, 1, 8) == cheapest_dispatch(64, 1, 8) == "all_to_all"


def wrong_input(rank, ranks, wrong, dispatch):
    layer, routes = layer_of(2, 2, dispatch), draw_routes("random", T, E, 2, seed=rank)
    x, experts = torch.randn(T, H), routes.experts.clone()
    if rank == 3 and wrong == "expert":
        experts[5, 1] = E
    if rank == 3 and wrong == "dtype":
        x = x.double()
    try:
        layer(x, experts, routes.probabilities)
    except (InputError, TypeError, SharedFailure) as error:
        text = str(error)
        layer(torch.randn(T, H), *routes)  # the ranks are in step again
        return type(error), text


def test_every_rank_raises_the_error_of_one():
    cases = [("expert", "all_to_all"), ("dtype", "all_gather")]
    of_expert, of_dtype = run_cases_on_ranks(wrong_input, 4, cases, timeout_s=60)
    for kind, text in of_expert:
        assert kind is SharedInputError and "experts has 8; it must have numbers from 0 to 7" in text
    for kind, text in of_dtype:
        assert kind is SharedFailure and "x.dtype=float64 must be one of: float32" in text


def recomputed(rank, ranks, dispatch, parts):
    layer, routes = layer_of(ranks, 1, dispatch, overlap=parts), draw_routes("random", T, E, 2, seed=rank)
    x, gradient = torch.randn(T, H), torch.randn(T, H)

    def run(function):
        layer.zero_grad()
        leaf, probabilities = x.clone().requires_grad_(), routes.probabilities.clone().requires_grad_()
        with record_communication() as ledger:
            function(leaf, routes.experts, probabilities).backward(gradient)
        return [leaf.grad, probabilities.grad, *(p.grad for p in layer.parameters())], ledger.counts

    (plain, counts), (again, more) = run(layer), run(lambda *args: checkpoint(layer, *args, use_reentrant=False))
    extra = {kind: more[kind] - counts[kind] for kind in more if more[kind] != counts[kind]}
    return all(a.equal(b) for a, b in zip(plain, again, strict=True)), extra


def test_recomputation_takes_the_same_routes_and_does_not_return_results_again():
    cases = [("all_to_all", 1), ("all_to_all", 2), ("all_gather", 1)]
    wanted = [{"all_gather": 1, "all_to_all": 2}, {"all_gather": 1, "all_to_all": 6}, {"all_gather": 3}]
    for case, of_ranks, extra in zip(cases, run_cases_on_ranks(recomputed, 2, cases), wanted, strict=True):
        assert of_ranks == [(True, extra)] * 2, case


def shared_expert(rank, ranks, dispatch):
    """Note the order of collectives and products around a product that runs under the exchange."""
    layer, routes = layer_of(ranks, 1, dispatch), draw_routes("balanced", T, E, 2, rank=rank, num_ranks=ranks)
    weight = torch.randn(H, H, requires_grad=True)
    x = torch.randn(T, H, requires_grad=True)
    with record_communication() as ledger:
        y, shared = layer(x, *routes, meanwhile=lambda: x @ weight)
        forward = list(ledger.order)
        (y + shared).sum().backward()
    backward = ledger.order[len(forward) :]
    first, last = forward.index("mm"), max(i for i, kind in enumerate(backward) if kind != "mm")
    return (
        forward[:first],
        forward[first : first + 2],
        backward[last + 1 :],
        weight.grad.equal(x.detach().T @ torch.ones(T, H)),
    )


def test_a_shared_expert_runs_under_the_exchange():
    for before, then, after, right in run_on_ranks(shared_expert, 2, "all_to_all"):
        assert before == ["all_gather", "all_to_all", "all_to_all"] and then == ["mm", "mm"]
        assert after == ["mm", "mm"] and right


def slots_of_no_tokens(rank, ranks):
    """Rank 1 has no token; both ranks send the same number of rows."""
    layer, whole = layer_of(ranks, 1, "all_to_all"), layer_of(1, 1)
    routes, x = draw_routes("random", 12 * (rank == 0), E, 2), torch.randn(12 * (rank == 0), H, requires_grad=True)
    y = layer(x, *routes, slots=12)
    y.sum().backward()
    return torch.allclose(y, whole(x, *routes, slots=12), atol=1e-6) and x.grad.shape == x.shape


def test_slots_on_a_rank_without_tokens():
    assert run_on_ranks(slots_of_no_tokens, 2) == [True, True]


def fake(rank, ranks):
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    found = []
    with FakeTensorMode():  # any number that is read on the host raises
        ep_group = dist.new_group(list(range(8)))
        for slots, dispatch in ((None, "all_to_all"), (4, "all_to_all"), (4, "all_gather")):
            layer = ExpertMLP(E, 16, 32, ep_group=ep_group, dispatch=dispatch, dtype=torch.bfloat16)
            x = torch.randn(T, 16, dtype=torch.bfloat16, requires_grad=True)
            with record_communication() as ledger:
                layer(x, torch.zeros(T, 2, dtype=torch.int64), torch.zeros(T, 2), slots=slots).sum().backward()
            rows = max(entry.elements for entry in ledger.entries) // 16
            found.append((tuple(x.grad.shape), tuple(layer.expansion_weight.grad.shape), rows))
    return found


def test_tensors_without_values_have_balanced_routes_and_slots_need_no_values():
    rows = [T * 2 * 7 // 8, 4 * 7, 8 * T]
    assert run_on_ranks(fake, 1) == [[((T, 16), (64, 16), number) for number in rows]]
