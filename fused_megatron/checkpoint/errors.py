"""Errors of checkpoints that cannot be written or read, with messages for errors of the operating system."""

import errno
import os
from pathlib import Path

from fused_megatron.checks import SharedError


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or its files are damaged: one line that names the file and the cause.

    A good checkpoint that does not fit the run, for example of another model, raises `checks.InputError` instead.
    """


class UnreadableError(CheckpointError):
    """A file could not be read but may be good: a permission, a network file system, too many open files."""


class SharedCheckpointError(SharedError, CheckpointError):
    """A CheckpointError that every rank raises."""


# Errors caused by the content of a folder. All other errors of the system may be temporary.
_WRONG_CONTENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)


def read_error(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file that cannot be opened or read: an UnreadableError unless the file is damaged."""
    kind = CheckpointError if error.errno in _WRONG_CONTENT else UnreadableError
    return kind(f"{path}: cannot be read: {error.strerror or error}")


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def free_bytes(folder: Path) -> int:
    """Return the number of bytes that an unprivileged process may still write in folder."""
    statistics = os.statvfs(folder)
    return statistics.f_bavail * statistics.f_frsize


def disk_full(folder: Path, needed_bytes: int) -> str:
    """Return the message 'disk full: needs X MB, Y MB free on FOLDER', with the way out."""
    try:
        free = megabytes(free_bytes(folder))
    except OSError:
        free = "unknown"
    return (
        f"disk full: needs {megabytes(needed_bytes)}, {free} free on {folder} "
        "(free some space, or keep fewer checkpoints)"
    )


def explain_os_error(error: OSError, folder: Path, needed_bytes: int) -> str:
    """Describe why a write failed, and what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(folder, needed_bytes)
    if error.errno == errno.EFBIG:
        return f"file too large: needs {megabytes(needed_bytes)}, beyond the limit on one file (see `ulimit -f`)"
    if error.errno == errno.ENOENT:
        return f"{folder} is not there (all ranks need one shared folder)"
    return error.strerror or str(error)
