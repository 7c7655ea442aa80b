"""Start here when a drawn routing is not the one that its name says."""

import torch

from fused_megatron.testing.drawn_routes import ROUTINGS, draw_routes, ragged_tokens
from fused_megatron.testing.recorded_routes import recorded_routes

E, K, RANKS, T = 16, 3, 4, 64


def test_every_routing_is_what_it_says():
    for routing in ROUTINGS:
        drawn = [draw_routes(routing, T, E, K, rank=rank, num_ranks=RANKS) for rank in range(RANKS)]
        for experts, probabilities in drawn:
            assert all(len(set(chosen)) == K for chosen in experts.tolist())
            assert torch.allclose(probabilities.sum(1), torch.ones(T)) and experts.dtype == torch.int64
        loads = torch.stack([torch.bincount(experts.flatten(), minlength=E) for experts, _ in drawn])
        total, of_ranks = loads.sum(0), loads.view(RANKS, RANKS, -1).sum(-1)
        holds = {
            "balanced": bool((loads == T * K / E).all()),
            "random": bool((total > 0).all() and (total < 2 * total.float().mean()).all()),
            "one_expert": int(total.max()) == T * RANKS and int(total.topk(2).values[1]) < T * RANKS / 2,
            "one_rank": of_ranks.sum(0).tolist() == [0, 0, 0, T * K * RANKS],
            "empty_rank": int(of_ranks.sum(0)[0]) == 0 and bool((of_ranks.sum(0)[1:] > 0).all()),
            "rotating": all(int(of_ranks[rank, (rank + 1) % RANKS]) == T * K for rank in range(RANKS)),
            # Not even, and not random either: the most loaded expert has some times the mean.
            "recorded": bool((total > 0).all() and 1.5 < total.max() / total.float().mean() < 4),
            "bursts": all((experts[1:] == experts[:-1]).all(1).sum() > T / 2 for experts, _ in drawn),
        }
        assert holds[routing], routing
    later = draw_routes("rotating", T, E, K, rank=0, num_ranks=RANKS, step=1).experts
    assert set(later.flatten().tolist()) == {8, 9, 10, 11}


def test_recorded_routes_are_those_of_the_record():
    drawn = draw_routes("recorded", 256, 8, 2, rank=1, num_ranks=2, step=2).experts
    assert torch.equal(drawn.sort().values, recorded_routes(2)[256:].sort().values)
    for block in range(3):
        loads = torch.bincount(recorded_routes(block).flatten(), minlength=8)
        assert loads.sum() == 1024 and 1.5 * 128 < loads.max() < 2.5 * 128


def test_numbers_of_tokens_differ_and_one_rank_has_none():
    assert len(set(ragged_tokens(24, 4))) == 4 and 0 in ragged_tokens(24, 4)
    assert draw_routes("bursts", 0, E, K).experts.shape == (0, K)
