"""Start here when a rank is called dead that lives, or the other way round."""

import os
import pickle
import time

import pytest

from fused_megatron.testing.run_on_ranks import RankError, run_on_ranks
from fused_megatron.training.presence import LostRankError, Presence


def test_one_process_has_no_one_to_lose() -> None:
    error = RuntimeError("a fault of ours")
    assert Presence().explain(error) is error


def told(rank: int, world_size: int) -> None:
    presence = Presence()
    if rank == 1:
        os._exit(3)  # lost: it says nothing
    error = RuntimeError("connection  closed\nby peer")
    if rank == 2:
        explained = presence.explain(error)
        os._exit(4 if isinstance(explained, LostRankError) and explained.ranks == (1,) else 5)
    time.sleep(0.5)  # rank 2 is gone by now, too, but it had said why
    raise presence.explain(error)


def test_a_rank_that_left_with_an_error_is_not_lost() -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(told, 3)
    found = caught.value.errors[0]
    assert isinstance(found, LostRankError) and found.ranks == (1,)
    assert str(found) == "lost contact with rank 1 (connection closed by peer)"
    assert "rank 2 died with exit code 4" in str(caught.value)
    assert pickle.loads(pickle.dumps(found)).ranks == (1,)


def all_alive(rank: int, world_size: int) -> bool:
    error = RuntimeError("a fault of ours")
    return Presence().explain(error) is error


def test_an_error_while_all_live_is_left_alone() -> None:
    assert run_on_ranks(all_alive, 2) == [True, True]
