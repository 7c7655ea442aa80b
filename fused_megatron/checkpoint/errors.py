"""The error of a checkpoint that cannot be written or read, and how the system's errors are put into words."""

import errno
import os
from pathlib import Path

from fused_megatron.checks import SharedError


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or its files are broken: one line that names the file and the cause.

    (A checkpoint that is whole but does not fit this run, as one of another model, is a `checks.InputError`.)
    """


class UnreadableError(CheckpointError):
    """A file that may be whole could not be read: a permission, a network file system, too many open files."""


class SharedCheckpointError(SharedError, CheckpointError):
    """A CheckpointError that every rank raises."""


# What the content of a folder is to blame for. Whatever else the system says may be over in a moment.
_WRONG_CONTENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)


def read_error(path: Path, error: OSError) -> CheckpointError:
    """The error of a file that the system does not open or read: an UnreadableError unless it is damage."""
    kind = CheckpointError if error.errno in _WRONG_CONTENT else UnreadableError
    return kind(f"{path}: cannot be read: {error.strerror or error}")


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def free_bytes(folder: Path) -> int:
    """Bytes that an unprivileged process may still write in folder."""
    statistics = os.statvfs(folder)
    return statistics.f_bavail * statistics.f_frsize


def disk_full(folder: Path, needed_bytes: int) -> str:
    """'disk full: needs X MB, Y MB free on FOLDER', and the way out."""
    try:
        free = megabytes(free_bytes(folder))
    except OSError:
        free = "unknown"
    return (
        f"disk full: needs {megabytes(needed_bytes)}, {free} free on {folder} "
        "(free some space, or keep fewer checkpoints)"
    )


def explain_os_error(error: OSError, folder: Path, needed_bytes: int) -> str:
    """The cause of a failed write in words that say what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(folder, needed_bytes)
    if error.errno == errno.EFBIG:
        return f"file too large: needs {megabytes(needed_bytes)}, beyond the limit on one file (see `ulimit -f`)"
    if error.errno == errno.ENOENT:
        return f"{folder} is not there (all ranks need one shared folder)"
    return error.strerror or str(error)
