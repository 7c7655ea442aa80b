"""Start here when two runs write in one run folder, or a dead run blocks another one."""

import fcntl
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fused_megatron.checks import InputError
from fused_megatron.training.run_folder_lease import Lease, LeaseLostError


def lease(folder: Path, **seconds: float) -> Lease:
    return Lease(folder / "lease.json", **{"beat_s": 0.02, "stale_s": 0.2, "ending_s": 5.0, **seconds})


def take(folder: Path, **seconds: float) -> list[str]:
    """Take the lease and give it back; return the printed lines."""
    said: list[str] = []
    run = lease(folder, **seconds)
    run.take(said.append)
    run.check()
    run.give_back()
    assert not any(folder.iterdir())
    return said


def write_holder(folder: Path, **changes: Any) -> Path:
    """Write the file as a run on another machine would leave it."""
    holder = {"run": "5eed", "host": "elsewhere", "boot": "another", "pid": 77, "launcher": None, **changes}
    path = folder / "lease.json"
    path.write_text(json.dumps(holder))
    return path


def test_one_at_a_time(tmp_path: Path) -> None:
    first = lease(tmp_path, beat_s=600.0)  # only the system's lock shows that it lives
    first.take(print)
    with pytest.raises(InputError, match=rf"run_folder={tmp_path} is in use by run \w+ \(process {os.getpid()} on "):
        lease(tmp_path).take(print)
    first.check()
    first.give_back()
    first.give_back()
    assert take(tmp_path) == []


def test_what_a_killed_run_of_this_machine_leaves_holds_nobody_up(tmp_path: Path) -> None:
    process = os.fork()
    if process == 0:
        lease(tmp_path).take(print)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert json.loads((tmp_path / "lease.json").read_text())["run"]
    assert take(tmp_path, stale_s=5.0) == []


def test_a_run_of_another_machine_that_gives_signs(tmp_path: Path) -> None:
    path = write_holder(tmp_path)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    said: list[str] = []
    try:
        with pytest.raises(InputError, match=r"in use by run 5eed \(process 77 on elsewhere\): wait until"):
            lease(tmp_path, stale_s=60.0).take(said.append)
    finally:
        ended.set()
        thread.join()
    assert [line.endswith("for a sign of run 5eed (process 77 on elsewhere)") for line in said] == [True]
    assert json.loads(path.read_text())["run"] == "5eed"


def test_a_run_of_another_machine_that_is_silent(tmp_path: Path) -> None:
    path = write_holder(tmp_path)
    os.utime(path, (time.time() - 60, time.time() - 60))
    assert take(tmp_path) == []
    path = write_holder(tmp_path)
    os.utime(path, (time.time() + 600, time.time() + 600))  # a clock that is fast
    assert len(take(tmp_path)) == 1
    path.write_text("half a li")
    os.utime(path, (0, 0))
    assert take(tmp_path) == []


def test_a_run_that_was_silent_too_long_ends(tmp_path: Path) -> None:
    run = lease(tmp_path)
    run.take(print)
    path = write_holder(tmp_path)
    with pytest.raises(LeaseLostError, match=f"run folder {tmp_path} was taken by run 5eed .process 77 on elsewhere"):
        run.check()
    run._thread.join()  # it no longer touches the file
    run.give_back()
    assert json.loads(path.read_text())["run"] == "5eed"


def test_a_run_whose_launcher_is_gone_is_waited_for(tmp_path: Path) -> None:
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    path = write_holder(tmp_path, boot=lease(tmp_path)._ours["boot"], launcher=gone)
    said: list[str] = []
    with open(path, "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)

        def ends(text: str) -> None:
            said.append(text)
            fcntl.flock(holder, fcntl.LOCK_UN)

        run = lease(tmp_path)
        run.take(ends)
    run.give_back()
    assert said == [
        "waiting for run 5eed (process 77 on elsewhere), whose launcher is gone, to write its last checkpoint"
    ]


def test_a_folder_that_goes_away_under_a_run(tmp_path: Path) -> None:
    run = lease(tmp_path)
    run.take(print)
    (tmp_path / "lease.json").unlink()
    assert not run._is_taken_over()
    run.check()
    run.give_back()


def test_other_things_at_the_path_of_the_lease(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    for make, why in (
        (path.mkdir, "Is a directory"),
        (lambda: os.mkfifo(path), "not a plain file"),
        (lambda: path.symlink_to(tmp_path / "none" / "lease"), "Too many levels of symbolic links"),
    ):
        make()
        with pytest.raises(InputError, match=rf"lease.json cannot be written: {why} \(repair that, or choose another"):
            lease(tmp_path).take(print)
        path.rmdir() if path.is_dir() else path.unlink()
    path.write_bytes(b"\x00\xff" * 3000)  # a damaged file of a run on another machine, which is silent
    assert len(take(tmp_path)) == 1


def test_a_rank_with_another_folder_is_named(tmp_path: Path) -> None:
    first, other = lease(tmp_path), tmp_path / "other"
    first.take(print)
    other.mkdir()
    lease(tmp_path).check_seen(first.run, wait_s=0.0)
    for folder, run in ((other, first.run), (tmp_path, "of another run")):
        with pytest.raises(InputError, match=r"is not rank 0's folder \(all ranks need one shared folder\)"):
            lease(folder).check_seen(run, wait_s=0.0)
    first.give_back()


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match=r"lease.json cannot be written: No space left on device \(repair that"):
        lease(tmp_path).take(print)
