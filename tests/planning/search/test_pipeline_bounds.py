"""Start here when the bound of all pipelines of a layout is above a prediction, or opens too much of a search."""

from fused_megatron.config import GPTConfig
from fused_megatron.planning.search.layouts import Settings
from fused_megatron.planning.search.pipeline_bounds import (
    Pipeline,
    RankUnits,
    Units,
    fastest,
    least_seconds,
    units_of_ranks,
)
from fused_megatron.planning.search.recomputations import least_recomputed, recomputations

MODEL = GPTConfig(num_layers=4, hidden_size=64, num_heads=4, seq_len=16, vocab_size=64)
# F and B of a dense block take 2 and 5 s, of the embedding 1 and 1 s, of the head 3 and 4 s; a block again 2 s of B.
UNITS = Units((2, 0, 0, 0, 1, 3), (0,) * 6, (5, 0, 2, 0, 1, 4), (0,) * 6)


def test_bound_of_two_ranks_by_hand() -> None:
    pipeline = Pipeline(units_of_ranks(MODEL, (0, 1), 1), splits=False)
    assert set(pipeline.ranks) == {
        RankUnits((2, 0, 1, 0, 1, 0), (0, 0, 0, 0, 0, 0)),
        RankUnits((2, 0, 1, 0, 0, 1), (2, 0, 1, 0, 1, 0)),
    }
    # Rank 1: 3 x (2 x 2 + 3 + 2 x 5 + 2 + 4) s, after 5 s of F and before 13 s of B on rank 0.
    assert least_seconds([pipeline], UNITS, 3, max) == 3 * 23 + 5 + 13
    assert least_seconds([pipeline._replace(splits=True)], UNITS, 3, max) == 3 * 23 + 5
    host = UNITS._replace(forward_host=(9, 0, 0, 0, 0, 0))
    assert least_seconds([pipeline], host, 3, max) == 3 * (18 + 16) + 18 + 13


def test_only_pipelines_and_ranks_that_can_decide_stay() -> None:
    four = units_of_ranks(
        GPTConfig(num_layers=16, hidden_size=64, num_heads=4, seq_len=16, vocab_size=64), (0, 1, 2, 3), 0
    )
    assert len(four) == 2 and all(not a.is_within(b) for a in four for b in four if a is not b)
    plain, interleaved = (Pipeline(units_of_ranks(MODEL, ranks, 0), False) for ranks in ((0, 1), (0, 1, 0, 1)))
    split = plain._replace(splits=True)
    assert fastest([plain, interleaved]) == [interleaved] and fastest([plain, split]) == [split]
    assert fastest([split, interleaved]) == [split, interleaved]


def test_least_recomputation_is_the_least_of_all() -> None:
    for blocks in range(1, 40):
        numbers = [one.recompute_blocks or blocks for one in recomputations(Settings(1, False, "1f1b", 1), blocks)[2:]]
        assert least_recomputed(blocks) == min(numbers)
