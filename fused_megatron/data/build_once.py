"""Cache folders that several processes need: one process builds each, atomically, and the others wait for it."""

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
    """Return $XDG_CACHE_HOME/fused_megatron, or ~/.cache/fused_megatron.

    Raises:
        InputError: there is no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification says to ignore relative paths
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
    """Load the folder cache_dir/name; build it first if it is missing or damaged.

    Any number of processes may call this at once: one builds, the others wait. The operating system releases the lock
    of a process that dies, so nobody waits for it. The next process that builds removes the files that it left.

    Args:
        cache_dir: created if it is missing.
        name: name of the folder; it must differ if anything differs that the content depends on.
        build: fills an empty folder.
        load: returns the content of the folder, or None if the folder is missing or damaged.
        on_wait: called once if another process is building.

    Raises:
        InputError: cache_dir cannot be written.
    """
    target = cache_dir / name
    loaded = load(target)  # without the lock, so that a cache on a read-only disk works
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
    temporary.mkdir()  # with the permissions of the umask (mkdtemp's are for one user): a cache may be shared
    try:
        build(temporary)
        sync_folder(temporary)
        shutil.rmtree(target, ignore_errors=True)  # target may be damaged, and rename needs none, or an empty one
        try:
            os.rename(temporary, target)
        except OSError as error:
            # On a file system without locks, another process may have built the same content first.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path, on_wait: Callable[[], None] | None) -> Iterator[bool]:
    """Hold the lock of a file; yield False if the file system has no locks."""
    # The file is never removed: otherwise a process could lock the old file while another locks a new one.
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
    """Open the lock file. Refuse a symbolic link: opening it could create a file anywhere."""
    try:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except PermissionError:  # another user owns the file, but it can be locked
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(f"{path}: a link in the place of a lock's file: remove it") from None
        raise
