"""Folders that several processes need and one of them builds: whole or not at all."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from fused_megatron.checks import InputError
from fused_megatron.durable import sync_folder

_T = TypeVar("_T")


def default_cache_folder() -> Path:
    """$XDG_CACHE_HOME/fused_megatron, or ~/.cache/fused_megatron.

    Raises:
        InputError: there is no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification: relative paths are to be ignored
        return Path(base) / "fused_megatron"
    try:
        return Path.home() / ".cache" / "fused_megatron"
    except RuntimeError:
        raise InputError("there is no home folder to cache prepared text in: give data.cache_folder") from None


def build_once(
    cache_dir: Path,
    name: str,
    build: Callable[[Path], None],
    load: Callable[[Path], _T | None],
    on_wait: Callable[[], None] | None = None,
) -> _T:
    """Load cache_dir/name, building it first where it is missing or damaged.

    Any number of processes may call this at once: one builds, the others wait for it. The operating system drops the
    lock with the process, so that nobody waits for the dead; what a killed process left behind is removed by the
    next that builds.

    Args:
        cache_dir: created where missing.
        name: of the folder; everything that its content depends on must be part of it.
        build: fills the empty folder that it is given.
        load: what is in the folder, or None where that is not usable.
        on_wait: called once when another process is building.

    Raises:
        InputError: cache_dir cannot be written.
    """
    target = cache_dir / name
    loaded = load(target)  # without a lock, so that a cache on a read-only disk can be used
    if loaded is not None:
        return loaded
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir / f"{name}.lock", on_wait) as locked:
            loaded = load(target)
            if loaded is not None:
                return loaded
            if locked:
                for stale in cache_dir.glob(f"{name}.tmp-*"):
                    shutil.rmtree(stale, ignore_errors=True)
            _build(target, build)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else f"cannot be written ({error.strerror})"
        raise InputError(f"cache folder {cache_dir}: {reason}: give another one by data.cache_folder") from error
    loaded = load(target)
    assert loaded is not None, f"{target} was built but does not load"
    return loaded


def _build(target: Path, build: Callable[[Path], None]) -> None:
    temporary = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
    temporary.mkdir()  # as the umask has it, and not for one user as mkdtemp's: a cache may be shared
    try:
        build(temporary)
        sync_folder(temporary)
        shutil.rmtree(target, ignore_errors=True)  # a damaged one; rename wants nothing or an empty folder
        try:
            os.rename(temporary, target)
        except OSError as error:
            # Only where the file system has no locks: another process was faster with the same content.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path, on_wait: Callable[[], None] | None) -> Iterator[bool]:
    """Hold the file's lock; yields False where the file system has none."""
    # Never removed: a process could hold the lock of a file that is gone while another makes a new one.
    descriptor = _open_lock(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """Descriptor of the lock's file. A link in its place is refused: it would make a file wherever it points."""
    try:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except PermissionError:  # another user's, which may be locked all the same
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(f"{path}: a link in the place of a lock's file: remove it") from None
        raise
