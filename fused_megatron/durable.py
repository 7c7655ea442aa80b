"""Durable file operations: atomic replacement, and fsync of files and folders before a call returns."""

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fused_megatron.checks import InputError, check


def write_all(descriptor: int, data: memoryview) -> None:
    """Write every byte of data; a single os.write may write fewer."""
    while len(data):
        data = data[os.write(descriptor, data) :]


@contextlib.contextmanager
def new_durable_file(path: Path) -> Iterator[int]:
    """Create a file that must not exist yet; yield its descriptor, and fsync it if the block ends without an error."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_can_write(name: str, path: Path) -> None:
    """Raise InputError unless a file can be written at this path: to be called before minutes of work.

    Args:
        name: of the option, for the message.
        path: of the file, which may exist.
    """
    check(path.absolute().parent.is_dir(), f"{name}={str(path)!r:.80} must be in a folder that exists")
    check(not path.is_dir(), f"{name}={str(path)!r:.80} must be the name of a file, and is a folder")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise InputError(
            f"{name}={str(path)!r:.80} must be in a folder that can be written: {error.strerror}"
        ) from None


def replace_file(path: Path, content: bytes) -> bool:
    """Replace the file's content atomically, even if the process dies; return False if the content is unchanged."""
    with contextlib.suppress(OSError):
        if path.read_bytes() == content:
            return False
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with new_durable_file(temporary) as descriptor:
            write_all(descriptor, memoryview(content))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def sync_folder(folder: Path) -> None:
    """Make the names in folder durable: a rename is on the disk only after an fsync of its folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot fsync a folder
            raise
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Rename folder, then delete it: a process killed half-way leaves no broken checkpoint under a valid name."""
    trash = folder.with_name(f"{folder.name.split('.')[0]}.trash-{secrets.token_hex(4)}")
    os.rename(folder, trash)
    shutil.rmtree(trash)
