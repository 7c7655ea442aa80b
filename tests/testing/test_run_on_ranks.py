"""Start here when run_on_ranks hangs, hides an error of a rank, or leaves processes behind."""

import os
import signal
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from fused_megatron.checks import InputError
from fused_megatron.testing import RankError, run_cases_on_ranks, run_on_ranks


@dataclass
class Answer:
    rank: int
    total: torch.Tensor
    pid: int


def sum_of_ranks(rank, world_size, scale):
    assert dist.get_world_size() == world_size and dist.get_rank() == rank
    total = scale * rank
    dist.all_reduce(total)
    return Answer(rank, total, os.getpid())


def fail_on_rank_1(rank, world_size):
    if rank == 1:
        raise InputError("banana=3 must be even")
    dist.barrier()


def fail_everywhere(rank, world_size):
    raise InputError(f"bad on {rank}")


def hang_on_rank_2(rank, world_size):
    while rank == 2:
        time.sleep(0.1)
    return os.getpid()


def leave_on_rank_0(rank, world_size):
    if rank == 0:
        os._exit(7)
    dist.barrier()


def threads(rank, world_size):
    return torch.get_num_threads()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_by_rank(world_size):
    answers = run_on_ranks(sum_of_ranks, world_size, torch.tensor([1.0, 2.0]))
    assert [a.rank for a in answers] == list(range(world_size))
    total = sum(range(world_size))
    assert all(torch.equal(a.total, torch.tensor([1.0, 2.0]) * total) for a in answers)
    assert len({a.pid for a in answers}) == world_size
    assert not any(alive(a.pid) for a in answers)


def test_one_thread_per_rank():
    assert run_on_ranks(threads, 2) == [1, 1]


def test_error_of_one_rank_is_raised_with_its_traceback():
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 raised") as info:
        run_on_ranks(fail_on_rank_1, 2, timeout_s=600)
    assert "banana=3 must be even" in str(info.value) and "fail_on_rank_1" in str(info.value)
    assert isinstance(info.value.errors[1], InputError)
    assert time.monotonic() - start < 300  # the other rank waits in a barrier with a timeout of 600 s
    assert run_on_ranks(threads, 2) == [1, 1]  # the failure does not affect the next call


def test_errors_of_all_ranks():
    with pytest.raises(RankError) as info:
        run_on_ranks(fail_everywhere, 3)
    assert {rank: str(error) for rank, error in info.value.errors.items()} == {r: f"bad on {r}" for r in range(3)}


def test_hang_names_the_rank(capfd):
    with pytest.raises(RankError, match=r"rank 2 did not answer within timeout_s=6 and was killed") as info:
        run_on_ranks(hang_on_rank_2, 3, timeout_s=6)
    assert info.value.silent == (2,)
    assert "hang_on_rank_2" in capfd.readouterr().err  # its stack


def test_death_names_the_rank_and_exit_code():
    with pytest.raises(RankError, match="rank 0 died with exit code 7"):
        run_on_ranks(leave_on_rank_0, 2)


def pid_and_case(rank, world_size, case, refused=False):
    if refused and rank == 1:
        raise InputError("banana=3 must be even")
    dist.barrier()
    return case, rank, os.getpid()


def test_cases_share_their_ranks_and_an_error_names_its_case():
    cases = run_cases_on_ranks(pid_and_case, 2, [("a",), ("b",)])
    assert [[answer[:2] for answer in answers] for answers in cases] == [[(c, 0), (c, 1)] for c in "ab"]
    assert cases[0][0][2] == cases[1][0][2] != cases[0][1][2]
    with pytest.raises(RankError, match=r"rank 1 raised:\ncase \('c', True\):\nTraceback"):
        run_cases_on_ranks(pid_and_case, 2, [("a",), ("c", True), ("d",)])


def test_local_function_is_refused():
    with pytest.raises(InputError, match="top level"):
        run_on_ranks(lambda rank, world_size: None, 2)


def take_parent_away(rank, world_size, folder, parent):
    (folder / str(rank)).write_text(f"{os.getpid()} {os.getppid()}")
    dist.barrier()
    if rank == 0:
        os.kill(parent, signal.SIGKILL)
    time.sleep(1000)


def be_parent(rank, world_size, folder):
    run_on_ranks(take_parent_away, 2, folder, os.getpid())


def test_ranks_die_with_the_parent(tmp_path):
    with pytest.raises(RankError, match="rank 0 died with exit code -9"):
        run_on_ranks(be_parent, 1, tmp_path)
    pids = [int(pid) for rank in range(2) for pid in (tmp_path / str(rank)).read_text().split()]
    end = time.monotonic() + 40
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)
