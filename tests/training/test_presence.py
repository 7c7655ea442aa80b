"""Start here when a living rank is reported dead, or a dead one alive."""

import asyncio
import ctypes
import os
import pickle
import re
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fused_megatron.collectives.together import gather_json
from fused_megatron.mesh import init_mesh
from fused_megatron.testing.run_on_ranks import RankError, run_on_ranks
from fused_megatron.training.presence import LostRankError, Presence, _answer, reason_of


def test_one_process_has_no_one_to_lose() -> None:
    error = RuntimeError("a fault of ours")
    assert Presence().explain(error) is error


def told(rank: int, world_size: int) -> None:
    presence = Presence()
    if rank == 1:
        os._exit(3)  # lost: it tells the others nothing
    error = RuntimeError("connection  closed\nby peer")
    if rank == 2:
        explained = presence.explain(error)
        os._exit(4 if isinstance(explained, LostRankError) and explained.ranks == (1,) else 5)
    time.sleep(0.5)  # rank 2 is gone by now, too, but has told why
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


def test_a_rank_that_cuts_a_connection_is_asked_again() -> None:
    """A rank does so if it is too busy to read the question in time."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            listener.accept()[0].close()
            with listener.accept()[0] as connection:
                connection.recv(100)
                connection.sendall(b'"lives"')

        threading.Thread(target=serve, daemon=True).start()
        address = listener.getsockname()
        assert asyncio.run(_answer(address, b"?\n", asyncio.Semaphore(1))) == "lives"
    assert asyncio.run(_answer(address, b"?\n", asyncio.Semaphore(1))) == "gone"


def test_a_reason_is_one_line_without_the_places_in_gloo() -> None:
    error = RuntimeError("[/__w/gloo/tcp/pair.cc:78] Timed out waiting\n5000ms for recv")
    assert reason_of(error) == "Timed out waiting 5000ms for recv"


def spin() -> None:
    while True:
        pass


def let_world_wait(seconds: float) -> None:
    """Set the time-out of the default group, as init_process_group does; run_on_ranks has its own."""
    dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=seconds))


def one_does_not_come(rank: int, world_size: int, kind: str, axis: str) -> None:
    """Rank 3 of 2 x 2 does not join a collective of one axis; the ranks that waited for it fail the others."""
    let_world_wait(2)
    mesh = init_mesh(2, 2)
    presence = Presence()
    if rank == 3:
        if kind == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        spin()
    try:
        for group in (mesh.groups[(axis,)], mesh.groups[("pp" if axis == "tp" else "tp",)]):
            dist.all_reduce(torch.ones(3), group=group)
    except RuntimeError as error:
        explained = presence.explain(error)
        if rank == 0:
            time.sleep(1.0)  # the last rank to end, though no other waited for it
        raise explained from error


@pytest.mark.parametrize(
    ("kind", "axis", "wanted"),
    [
        ("stopped", "tp", r"lost contact with rank 3 \(.*rank 3 gives no sign of life: stopped, stuck or cut off\)"),
        ("spins", "pp", r"rank 3 did not come in time: rank 3 is in spin \(training/test_presence.py:\d+\) \(.*\)"),
    ],
)
def test_a_rank_that_does_not_come_is_named_by_all_others(kind: str, axis: str, wanted: str) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(one_does_not_come, 4, kind, axis, timeout_s=60)
    assert caught.value.silent == (3,)
    texts = [str(caught.value.errors[rank]) for rank in range(3)]
    assert any(re.fullmatch(wanted, text) for text in texts) and all("rank 3" in text for text in texts), texts
    assert all(isinstance(caught.value.errors[rank], LostRankError) for rank in range(3))


def one_works_long(rank: int, world_size: int, stops: bool) -> list[int]:
    let_world_wait(1)
    presence = Presence(1.0)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP) if stops else time.sleep(3.0)
    found = gather_json(rank, dist.group.WORLD)
    presence.close()
    return found


def test_a_rank_that_works_long_and_lives_is_waited_for() -> None:
    assert run_on_ranks(one_works_long, 3, False) == [[0, 1, 2]] * 3


def test_a_rank_that_stops_where_others_wait_long_ends_them(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(one_works_long, 3, True, timeout_s=60)
    assert "rank 0 died with exit code 1" in str(caught.value) and "rank 2 died with exit code 1" in str(caught.value)
    lines = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    wanted = re.compile(r"fused-megatron: error( \(rank 2\))?: lost contact with rank 1 \((.*)\); .*")
    found = [wanted.fullmatch(line) for line in lines]
    assert sorted(each[1] or "" for each in found) == ["", " (rank 2)"], lines
    silent = "it gave no sign of life for 1 s: stopped, stuck or cut off; it was last in "
    assert all(each[2].startswith(silent) for each in found), lines


def blocked_in_c(rank: int, world_size: int) -> None:
    """All ranks but one wait inside a C function, as a host waits for a GPU whose kernel waits for a lost rank."""
    presence = Presence(timeout_s=1.0)
    dist.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    ctypes.CDLL(None).sleep(60)
    presence.close()


def test_ranks_that_wait_for_a_device_name_a_silent_rank(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(blocked_in_c, 4, timeout_s=50)
    for rank in (0, 1, 3):
        assert f"rank {rank} died with exit code 1" in str(caught.value)
    lines = capfd.readouterr().err.splitlines()
    assert sum("lost contact with rank 2" in line for line in lines) == 3, lines
