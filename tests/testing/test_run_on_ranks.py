"""Start here when run_on_ranks hangs, hides an error of a rank, or leaves processes behind."""

import os
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from fused_megatron.checks import InputError
from fused_megatron.testing import RankError, run_on_ranks


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


def test_one_thread_a_rank():
    assert run_on_ranks(threads, 2) == [1, 1]


def test_error_of_one_rank_is_raised_with_its_traceback():
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 raised") as info:
        run_on_ranks(fail_on_rank_1, 2)
    assert "banana=3 must be even" in str(info.value) and "fail_on_rank_1" in str(info.value)
    assert isinstance(info.value.errors[1], InputError)
    assert time.monotonic() - start < 30  # the other rank sits in a barrier whose own timeout is 60 s
    assert run_on_ranks(threads, 2) == [1, 1]  # the failure does not reach the next call


def test_errors_of_all_ranks():
    with pytest.raises(RankError) as info:
        run_on_ranks(fail_everywhere, 3)
    assert {rank: str(error) for rank, error in info.value.errors.items()} == {r: f"bad on {r}" for r in range(3)}


def test_hang_names_the_rank(capfd):
    with pytest.raises(RankError, match=r"rank 2 did not answer within timeout_s=1.5 and was killed") as info:
        run_on_ranks(hang_on_rank_2, 3, timeout_s=1.5)
    assert info.value.silent == (2,)
    assert "hang_on_rank_2" in capfd.readouterr().err  # its stack


def test_death_names_the_rank_and_exit_code():
    with pytest.raises(RankError, match="rank 0 died with exit code 7"):
        run_on_ranks(leave_on_rank_0, 2)


def test_local_function_is_refused():
    with pytest.raises(InputError, match="top level"):
        run_on_ranks(lambda rank, world_size: None, 2)


def test_ranks_die_with_the_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys, time
            from fused_megatron.testing import run_on_ranks

            def hang(rank, world_size, path):
                with open(f"{path}/{rank}", "w") as file:
                    file.write(f"{os.getpid()} {os.getppid()} ")
                time.sleep(1000)

            if __name__ == "__main__":
                run_on_ranks(hang, 2, sys.argv[1])
            """
        )
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    try:
        pids = wait_for(
            lambda: [(tmp_path / str(rank)).read_text() for rank in range(2)], lambda: parent.poll() is None
        )
        pids = [int(pid) for text in pids for pid in text.split()]
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(alive(pid) for pid in pids) or 1 / 0)


def wait_for(get, still=lambda: True):
    end = time.monotonic() + 40
    while True:
        try:
            return get()
        except (OSError, ZeroDivisionError):
            assert still() and time.monotonic() < end
            time.sleep(0.05)
