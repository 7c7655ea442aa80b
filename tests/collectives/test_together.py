"""Start here when one rank fails and the others wait, or raise a different error."""

import os
import time

import pytest
import torch.distributed as dist

from fused_megatron.checkpoint import CheckpointError
from fused_megatron.checkpoint.errors import SharedCheckpointError
from fused_megatron.checks import InputError, SharedError, SharedInputError
from fused_megatron.collectives.together import (
    SharedFailure,
    build_together,
    gather_json,
    gather_outcomes,
    run_on_first,
    run_together,
)
from fused_megatron.testing import RankError, run_on_ranks


def exchange(rank, world_size):
    value = {"rank": rank, "text": "é" * (rank * 1000), "floats": [0.1, 1e300]}
    return gather_json(value, dist.group.WORLD)


def test_every_rank_gets_every_value_in_rank_order():
    answers = run_on_ranks(exchange, 3)
    assert answers[0] == answers[1] == answers[2]
    assert [a["rank"] for a in answers[0]] == [0, 1, 2] and len(answers[0][2]["text"]) == 2000
    assert gather_json({"alone": 1}, None) == [{"alone": 1}]


def fail(rank, world_size, failing, kind):
    def work():
        if rank in failing:
            raise {"input": InputError, "checkpoint": CheckpointError, "other": KeyError}[kind](f"bad {failing}")
        return rank

    return run_together(dist.group.WORLD, work, SharedCheckpointError)


@pytest.mark.parametrize(
    ("failing", "kind", "error", "text"),
    [
        ([1], "checkpoint", SharedCheckpointError, "rank 1: bad [1]"),
        ([1, 2], "input", SharedInputError, "rank 1: bad [1, 2] (and 1 more of 3 ranks failed)"),
        ([0, 1, 2], "input", SharedInputError, "bad [0, 1, 2]"),
        ([2], "other", SharedCheckpointError, "rank 2: KeyError: 'bad [2]'"),
    ],
)
def test_one_error_for_all(failing, kind, error, text):
    with pytest.raises(RankError) as caught:
        run_on_ranks(fail, 3, failing, kind)
    assert {(type(e), str(e)) for e in caught.value.errors.values()} == {(error, text)}
    assert len(caught.value.errors) == 3


def test_results_of_all_ranks():
    assert run_on_ranks(fail, 2, [], "input") == [[0, 1], [0, 1]]


def first_alone(rank, world_size, broken):
    def work():
        assert rank == 0
        if broken:
            raise CheckpointError("no room")
        return "made by 0"

    return run_on_first(dist.group.WORLD, work, SharedCheckpointError)


def test_all_ranks_get_the_result_of_rank_0():
    assert run_on_ranks(first_alone, 3, False) == ["made by 0"] * 3
    with pytest.raises(RankError) as caught:
        run_on_ranks(first_alone, 3, True)
    assert {(type(e), str(e)) for e in caught.value.errors.values()} == {(SharedCheckpointError, "rank 0: no room")}


def every_way(rank, world_size):
    def fail():
        raise (ValueError, InputError, OSError)[rank](f"rank {rank} of {world_size}")

    with pytest.raises(
        SharedFailure, match=r"^rank 0: ValueError: rank 0 of 3 \(and 2 more of 3 ranks failed\)$"
    ) as info:
        run_together(dist.group.WORLD, fail)
    own = info.value.__cause__
    value = build_together(dist.group.WORLD, lambda: {rank, "no JSON"})
    outcomes = gather_outcomes(dist.group.WORLD, rank, own if rank == 1 else None, plain=())
    return type(own).__name__, value, outcomes


def test_the_caller_chooses_what_is_exchanged():
    answers = run_on_ranks(every_way, 3)
    assert [name for name, _, _ in answers] == ["ValueError", "InputError", "OSError"]
    assert [value for _, value, _ in answers] == [{rank, "no JSON"} for rank in range(3)]
    for _, _, outcomes in answers:
        assert outcomes == [(0, None, False), (None, "InputError: rank 1 of 3", True), (2, None, False)]


def test_one_process_raises_what_all_ranks_would():
    def build():
        raise InputError("")

    with pytest.raises(SharedInputError, match=r"^$"):
        build_together(None, build)


def leave(rank, world_size):
    if rank == 1:
        os._exit(3)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"^another rank stopped while this one waited for it") as info:
        run_together(dist.group.WORLD, lambda: rank, SharedCheckpointError)
    # The remaining ranks fail in different ways, and each reports its own failure.
    assert not isinstance(info.value, SharedError) and isinstance(info.value.__cause__, RuntimeError)
    return time.monotonic() - start


def test_a_dead_rank_is_an_error_at_once():
    with pytest.raises(RankError, match="rank 1 died") as caught:
        run_on_ranks(leave, 2)
    assert caught.value.errors == {}  # rank 0 saw what it expected
