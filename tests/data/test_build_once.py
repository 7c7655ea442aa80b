"""Start here when prepared text is built twice, by two processes at once, or left half built."""

import errno
import multiprocessing
import os
import signal
import stat
from pathlib import Path

import pytest

from fused_megatron.checks import InputError
from fused_megatron.data.build_once import build_once, default_cache_folder
from fused_megatron.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter

# A fork starts in milliseconds; the children use neither torch nor threads.
processes = multiprocessing.get_context("fork")


def load(folder):
    try:
        text = (folder / "content").read_text()
    except OSError:
        return None
    return text if text != "damaged" else None


def write(folder, text="built"):
    (folder / "content").write_text(text)


def test_built_once_then_loaded(tmp_path):
    calls = []

    def build(folder):
        calls.append(folder)
        write(folder)

    for _ in range(3):
        assert build_once(tmp_path / "a" / "b", "name", build, load) == "built"
    assert len(calls) == 1
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["name", "name.lock"]


def test_damaged_content_is_built_again(tmp_path):
    (tmp_path / "name").mkdir()
    write(tmp_path / "name", "damaged")
    (tmp_path / "name" / "rest").touch()
    assert build_once(tmp_path, "name", write, load) == "built"
    assert [p.name for p in (tmp_path / "name").iterdir()] == ["content"]


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(folder):
        write(folder)
        raise KeyError

    with pytest.raises(KeyError):
        build_once(tmp_path, "name", build, load)
    assert [p.name for p in tmp_path.iterdir()] == ["name.lock"]


def _build_and_report(cache, queue, someone_waits, builds_alone=False):
    def build(folder):
        assert builds_alone or someone_waits.wait(300)
        write(folder, f"built by {os.getpid()}")

    def on_wait():
        waited.append(1)
        someone_waits.set()

    waited = []
    result = build_once(cache, "name", build, load, on_wait=on_wait)
    queue.put((result, len(waited)))


def test_one_of_many_processes_builds(tmp_path):
    queue, someone_waits = processes.Queue(), processes.Event()
    workers = [processes.Process(target=_build_and_report, args=(tmp_path, queue, someone_waits)) for _ in range(5)]
    for worker in workers:
        worker.start()
    reports = [queue.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert len({result for result, _ in reports}) == 1
    assert any(waited for _, waited in reports)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["name", "name.lock"]


def _build_and_die(cache, ready):
    def build(folder):
        write(folder, "half")
        ready.set()
        signal.pause()

    build_once(cache, "name", build, load)


def test_a_killed_builder_holds_nobody_up(tmp_path):
    ready = processes.Event()
    victim = processes.Process(target=_build_and_die, args=(tmp_path, ready))
    victim.start()
    assert ready.wait(300)
    queue, waits = processes.Queue(), processes.Event()
    waiter = processes.Process(target=_build_and_report, args=(tmp_path, queue, waits, True))
    waiter.start()
    assert waits.wait(300)
    assert waiter.is_alive() and load(tmp_path / "name") is None
    os.kill(victim.pid, signal.SIGKILL)
    assert queue.get(timeout=600) == (f"built by {waiter.pid}", 1)
    victim.join(60)
    waiter.join(60)
    # What the victim left behind is gone.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["name", "name.lock"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"cache folder .*file/cache: cannot be written \(Not a directory\).*data\.cache_folder"
    ):
        build_once(tmp_path / "file" / "cache", "name", write, load)


def test_disk_full_says_so(tmp_path):
    def build(folder):
        with open("/dev/full", "w") as file:
            file.write("x")

    with pytest.raises(InputError, match="the disk is full"):
        build_once(tmp_path, "name", build, load)


def test_default_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "fused_megatron"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_folder() == tmp_path / "home" / ".cache" / "fused_megatron"
    assert isinstance(default_cache_folder(), Path)


def test_file_systems_that_know_no_fsync_of_a_folder(monkeypatch, tmp_path):
    fsync, refused = os.fsync, []

    def fsync_of_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_of_files_only)
    assert build_once(tmp_path, "name", write, load) == "built"
    with IndexedDatasetWriter(tmp_path / "tokens", "u2") as writer:
        writer.add_document([1, 2, 3])
    assert IndexedDataset(tmp_path / "tokens")[0].tolist() == [1, 2, 3]
    assert len(refused) == 3  # the new folder, the cache, the folder of the dataset


def test_a_cache_is_shared_as_far_as_the_umask_has_it(tmp_path):
    before = os.umask(0o022)
    try:
        assert build_once(tmp_path, "name", write, load) == "built"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "name").stat().st_mode) == 0o755


def test_a_link_in_the_place_of_the_lock_is_refused(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "name.lock").symlink_to(tmp_path / "made")
    with pytest.raises(InputError, match=r"name\.lock: a link in the place of a lock's file: remove it"):
        build_once(tmp_path / "cache", "name", write, load)
    assert not (tmp_path / "made").exists()


def test_a_lock_that_another_user_made_is_enough(tmp_path, without_roots_rights):
    (tmp_path / "name.lock").touch(mode=0o444)
    with without_roots_rights():
        assert build_once(tmp_path, "name", write, load) == "built"
