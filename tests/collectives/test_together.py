"""Start here when an error of one rank leaves the others waiting."""

import os
import time

import pytest
import torch.distributed as dist

from fused_megatron.checkpoint import CheckpointError
from fused_megatron.checks import InputError
from fused_megatron.collectives.together import gather_json, run_on_first, run_together
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

    return run_together(dist.group.WORLD, work)


@pytest.mark.parametrize(
    ("failing", "kind", "error", "text"),
    [
        ([1], "checkpoint", CheckpointError, "rank 1: bad [1]"),
        ([1, 2], "input", InputError, "rank 1: bad [1, 2] (and 1 more of 3 ranks failed)"),
        ([0, 1, 2], "input", InputError, "bad [0, 1, 2]"),
        ([2], "other", CheckpointError, "rank 2: KeyError: 'bad [2]'"),
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

    return run_on_first(dist.group.WORLD, work)


def test_what_rank_0_does_alone_is_known_to_all():
    assert run_on_ranks(first_alone, 3, False) == ["made by 0"] * 3
    with pytest.raises(RankError) as caught:
        run_on_ranks(first_alone, 3, True)
    assert {(type(e), str(e)) for e in caught.value.errors.values()} == {(CheckpointError, "rank 0: no room")}


def leave(rank, world_size):
    if rank == 1:
        os._exit(3)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="another rank stopped"):
        gather_json(rank, dist.group.WORLD)
    return time.monotonic() - start


def test_a_dead_rank_is_an_error_at_once():
    with pytest.raises(RankError, match="rank 1 died") as caught:
        run_on_ranks(leave, 2)
    assert caught.value.errors == {}  # rank 0 saw what it expected
