"""Start here when verify accepts a wrong tensor, or does not name the first wrong tensor and its rank."""

import numpy as np

from fused_megatron.planning.verify.comparison import FLOAT32, LOW_PRECISION_FACTOR, Reference, compare
from fused_megatron.planning.verify.records import GRADIENT, LOSS, NORM, OUTPUT, START, WEIGHT, Key, Piece, RankRecord

FULL = {name: np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32) for name in ("a", "b")}
LR = 1e-3


def pieces(rank: int, num_ranks: int, name: str) -> Piece:
    """Return a rank's rows of a tensor."""
    rows = 4 // num_ranks
    place = ((rank * rows, (rank + 1) * rows), (0, 6))
    return Piece(FULL[name][rank * rows : (rank + 1) * rows].copy(), place)


def record(rank: int, num_ranks: int) -> RankRecord:
    found = RankRecord({"tp": rank} if num_ranks > 1 else {})
    for name in FULL:
        found.add(Key(START, 0, name), pieces(rank, num_ranks, name))
    found.add(Key(OUTPUT, 1, "layer"), pieces(rank, num_ranks, "a"))
    for step in (1, 2):
        found.add_number(Key(LOSS, step), 3.0)
        for name in ("b", "a"):
            found.add(Key(GRADIENT, step, name), pieces(rank, num_ranks, name))
        found.add_number(Key(NORM, step), 5.0)
        for name in FULL:
            found.add(Key(WEIGHT, step, name), pieces(rank, num_ranks, name))
    return found


def compared(change=lambda ranks: None, **options):
    ranks = [record(rank, 2) for rank in range(2)]
    change(ranks)
    return compare(Reference(record(0, 1), LR, **options), ranks)


def off(key: Key, by: float, rank: int = 1):
    """Return a function that changes one element."""

    def change(ranks: list[RankRecord]) -> None:
        ranks[rank].pieces[key][0].values.reshape(-1)[-1] += by

    return change


def test_the_same_is_the_same() -> None:
    result = compared()
    assert result.first is None
    kinds = (START, OUTPUT, LOSS, GRADIENT, NORM, WEIGHT)
    assert [(row.kind, row.num_different, row.error) for row in result.rows] == [(kind, 0, 0.0) for kind in kinds]
    assert [row.num_tensors for row in result.rows] == [2, 1, 2, 4, 2, 4]


def test_one_wrong_element_is_named_with_its_rank_and_place() -> None:
    key = Key(GRADIENT, 1, "a")
    largest = float(np.abs(FULL["a"]).max())
    first = compared(off(key, 0.5 * largest)).first
    assert first is not None and first.described == "gradient of a in step 1" and abs(first.error - 0.5) < 1e-6
    assert first.ranks == {1: "on rank 1 (tp 1), elements [2:4, 0:6] of [4, 6]"} and first.ranks_right == (0,)
    assert compared(off(key, 0.5 * FLOAT32 * largest)).first is None
    assert compared(off(key, 2.0 * FLOAT32 * largest)).first is not None


def test_the_first_in_the_order_of_computation_is_named() -> None:
    def change(ranks: list[RankRecord]) -> None:
        for key in (Key(WEIGHT, 1, "a"), Key(GRADIENT, 2, "b"), Key(GRADIENT, 1, "a"), Key(GRADIENT, 1, "b")):
            off(key, 1.0)(ranks)

    result = compared(change)
    assert result.first is not None and result.first.described == "gradient of b in step 1"
    assert {row.kind: row.num_different for row in result.rows}[GRADIENT] == 3


def test_what_is_nan_missing_or_of_another_shape_differs() -> None:
    nan = compared(off(Key(LOSS, 1), float("nan"))).first
    assert nan is not None and nan.kind == LOSS and np.isnan(nan.error)
    missing = compared(lambda ranks: ranks[0].pieces.pop(Key(WEIGHT, 2, "b"))).first
    assert missing is not None and missing.ranks == {-1: "12 of 24 elements are on no rank"}

    def reshaped(ranks: list[RankRecord]) -> None:
        ranks[1].pieces[Key(OUTPUT, 1, "layer")] = [Piece(np.zeros((5, 6), np.float32), ((2, 7), (0, 6)))]

    other = compared(reshaped).first
    assert other is not None and other.kind == OUTPUT and set(other.ranks) == {1}


def test_weights_at_the_start_are_equal_to_the_last_bit() -> None:
    assert compared(off(Key(START, 0, "a"), 1e-6)).first is not None


def test_weights_are_measured_by_the_learning_rate() -> None:
    key = Key(WEIGHT, 1, "a")
    assert compared(off(key, 0.1 * LR)).first is not None
    assert compared(off(key, 1e-3 * LR)).first is None


def test_a_gradient_of_nothing_but_rounding_is_measured_by_the_others() -> None:
    def small(found: RankRecord) -> RankRecord:
        found.pieces[Key(GRADIENT, 1, "a")][0].values[...] *= 1e-9
        return found

    ranks = [small(record(rank, 2)) for rank in range(2)]
    ranks[0].pieces[Key(GRADIENT, 1, "a")][0].values[...] *= -1
    assert compare(Reference(small(record(0, 1)), LR), ranks).first is None


def test_hints_decide_nothing() -> None:
    result = compared(off(Key(OUTPUT, 1, "layer"), 1.0), hints=(OUTPUT,))
    assert result.first is None and result.first_hint is not None
    assert result.first_hint.described == "output of layer in step 1"


def test_low_precision_is_measured_by_one_process_in_it() -> None:
    yardstick = record(0, 1)
    key = Key(GRADIENT, 1, "a")
    largest = float(np.abs(FULL["a"]).max())
    yardstick.pieces[key][0].values[0, 0] += 0.01 * largest
    allowed = LOW_PRECISION_FACTOR * 0.01 * largest
    assert compared(off(key, 0.9 * allowed), yardstick=yardstick).first is None
    assert compared(off(key, 1.1 * allowed), yardstick=yardstick).first is not None
