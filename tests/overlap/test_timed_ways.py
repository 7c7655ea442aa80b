"""Start here when torch's fused product is used although it is slower, or ranks of a group disagree on the way."""

import sys
from functools import partial

import torch
import torch.distributed as dist

from fused_megatron.overlap import ChunkChoice, OverlapCosts
from fused_megatron.overlap.timed_ways import BY_SYMMETRIC_MEMORY
from fused_megatron.testing.run_on_ranks import run_on_ranks

CHUNKS = 16
WHOLE, IN_CHUNKS, FUSED = 1, CHUNKS, BY_SYMMETRIC_MEMORY
REFUSED = 1e9
# For each case and rank the milliseconds of the ways; then the way that the slowest rank finds fastest.
CASES = {
    # PyTorch issue 143160 (8 H100, M 2048, N 3584, K 8192): NCCL and cuBLAS take 301 us, the decomposed op 354.
    "published": (2 * [{WHOLE: 0.301, IN_CHUNKS: 0.4, FUSED: 0.354}], WHOLE),
    "fused": (2 * [{WHOLE: 3.0, IN_CHUNKS: 2.5, FUSED: 2.0}], FUSED),
    "chunks": (2 * [{WHOLE: 3.0, IN_CHUNKS: 2.5, FUSED: 2.6}], IN_CHUNKS),
    "one_slow_rank": ([{WHOLE: 3.0, IN_CHUNKS: 9.0, FUSED: 1.0}, {WHOLE: 2.0, IN_CHUNKS: 1.0, FUSED: 3.5}], WHOLE),
    "refused": (2 * [{WHOLE: 3.0, IN_CHUNKS: 2.5, FUSED: REFUSED}], IN_CHUNKS),
    "even": (2 * [{WHOLE: 3.0, IN_CHUNKS: 3.0, FUSED: 3.0}], WHOLE),
}


class Clock:
    """Time that passes only when a way runs, so that no load of the machine decides."""

    def __init__(self):
        self.now_us, self.calls = 0, []

    def run(self, table, x, weight, dim, group, way):
        assert torch.is_grad_enabled() is False and x.isfinite().all() and weight.isfinite().all()
        self.calls.append((way, tuple(x.shape), tuple(weight.shape), weight.is_contiguous(), group is None))
        if table[way] == REFUSED:
            raise RuntimeError("torch refuses this shape")
        self.now_us += round(1e3 * (table[way] if group is not None else 0.25))

    def seconds_of(self, work, x, repeats):
        begin = self.now_us
        work(x)
        return 1e-6 * (self.now_us - begin)


def choose(rank, ranks):
    clock = Clock()
    costs = OverlapCosts(1e9, 0.0, 1e8, symmetric_memory=True)  # every product wants chunks
    sys.modules["fused_megatron.overlap.chunk_choice"].overlap_costs = lambda *arguments: costs
    sys.modules["fused_megatron.overlap.timed_ways"].seconds_of = clock.seconds_of
    group, choice, found = dist.group.WORLD, ChunkChoice(), {}
    x, weight = torch.randn(4096, 1, 8), torch.randn(6, 8)
    state = torch.get_rng_state()
    for name, (tables, _) in CASES.items():
        run = partial(clock.run, tables[rank])
        gathers = choice.decide_gather(x, weight, 0, group, run)
        number = len(clock.calls)
        found[name] = gathers, choice.for_reduction(x, weight.t().contiguous().t(), 0, group, run=run)
        again = choice.for_gather(x, weight, 0, group, run), choice.for_reduction(x, weight, 1, group, run=run)
        assert again == (gathers.num_chunks, CHUNKS), "timed once; torch has no fused op for another dim"
        found[name] += (clock.calls[:number], len(clock.calls) - number)
        clock.calls.clear()
        fixed = ChunkChoice(3).for_gather(x, weight, 0, group, run), ChunkChoice(1).for_gather(x, weight, 0, group, run)
        assert fixed == (3, 1) and not clock.calls

        def mlp(x, expansion, projection, tp_group, by_layers, table=tables[rank]):
            clock.now_us += round(1e3 * table[FUSED if by_layers else IN_CHUNKS])

        found[name] += (choice.prefers_layers(x, (weight, weight.t()), 0, group, mlp),)
        assert not choice.prefers_layers(x, (weight, weight.t()), 1, group, mlp)
    assert torch.equal(torch.get_rng_state(), state)
    return found


def test_the_fastest_way_on_the_slowest_rank_is_kept():
    first, second = run_on_ranks(choose, 2)
    assert first == second
    for name, (tables, wanted) in CASES.items():
        gathers, reduces, calls, later_calls, by_layers = first[name]
        most = {way: max(table[way] for table in tables) for way in tables[0]}
        assert gathers.num_chunks == reduces == wanted and gathers.is_timed, name
        assert (
            abs(gathers.product_s - 0.25e-3) < 1e-12 and abs(gathers.exposed_s - 1e-3 * (most[wanted] - 0.25)) < 1e-12
        ), name
        shapes = (4096, 1, 8), (6, 8), True
        assert calls == [(way, *shapes, False) for way in tables[0]] + [(1, (8192, 1, 8), (6, 8), True, True)], name
        assert later_calls == 4, name  # of the transposed weight
        assert by_layers == (most[FUSED] < most[IN_CHUNKS]), name
