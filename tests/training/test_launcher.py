"""Start here when a rank outlives its launcher, a signal does not reach it, or the exit code is not the command's."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from fused_megatron.checks import InputError
from fused_megatron.training.launcher import STORE_VARIABLE, launch, run_ranks

RANK = "import os, pathlib, signal, sys, time; folder, rank = pathlib.Path(sys.argv[1]), os.environ['RANK']\n"


def run(folder: Path, code: str, num_ranks: int = 2, grace_s: float = 10.0) -> int:
    return run_ranks(num_ranks, [sys.executable, "-c", RANK + code, str(folder)], grace_s=grace_s)


def test_every_rank_has_its_place(tmp_path: Path) -> None:
    code = "(folder / rank).write_text(' '.join(os.environ[name] for name in sys.argv[2:]))"
    names = ["LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", STORE_VARIABLE]
    assert run_ranks(3, [sys.executable, "-c", RANK + code, str(tmp_path), *names]) == 0
    found = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [place[:3] for place in found] == [[str(rank), "3", "3"] for rank in range(3)]
    (store,) = {place[3] for place in found}
    assert not Path(store).parent.exists()


def test_one_that_fails_ends_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "sys.exit(2) if rank == '1' else time.sleep(600)", grace_s=0.0) == 2
    assert "rank 0 was ended by SIGTERM" in capfd.readouterr().err
    assert run(tmp_path, "os.kill(os.getpid(), signal.SIGKILL) if rank == '1' else sys.exit(1)", 2) in (1, 137)
    assert "rank 1 was ended by SIGKILL" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_every_rank_once(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "came = []\n"
        f"signal.signal({int(number)}, lambda number, _: came.append(number))\n"
        "(folder / f'ready-{rank}').touch()\n"
        "while not came: time.sleep(0.01)\n"
        "time.sleep(0.1)\n"
        f"sys.exit(came != [{int(number)}])\n"
    )

    def send() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            ready.wait(0.01)
        os.kill(os.getpid(), number)

    ready = threading.Event()
    before = signal.getsignal(number)
    sender = threading.Thread(target=send)
    sender.start()
    assert run(tmp_path, code) == 0
    sender.join()
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train x.toml", "launch needs the number of ranks first"),
        ("", "launch needs the number of ranks first"),
        ("--nproc-per-node two train", "--nproc-per-node=two must be a number of ranks"),
        ("--nproc_per_node=0 train", "--nproc-per-node=0 must be"),
        ("--nproc-per-node 2", "launch starts ranks of one of train, generate, evaluate, convert, not of 'nothing'"),
        ("--nproc-per-node 2 doctor", "not of 'doctor'"),
    ],
)
def test_bad_words(words: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        launch(words.split())
