"""The lease of a run folder: one run at a time writes there."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fused_megatron.checkpoint.errors import CheckpointError
from fused_megatron.checks import InputError

# A holder shows every BEAT_S that it lives; after STALE_S without a sign a run on another machine takes the folder.
# Several beats, since a network file system may be silent for some seconds.
BEAT_S = 5.0
STALE_S = 30.0
# For a run whose launcher was killed to write its last checkpoint.
ENDING_S = 90.0
_POLL_S = 0.2
_MAX_BYTES = 4096


class LeaseLostError(CheckpointError):
    """Another run has taken the run folder."""


class Lease:
    """The right to write in a run folder: a file that names who has it.

    On one machine the system's lock of that file decides, which ends with the process: what a killed run leaves behind
    holds nobody up. A lock does not reach other machines on every shared file system, so the holder also touches the
    file every few seconds; a run on another machine takes it when it has been silent long enough.

    Args:
        path: of the file.
        beat_s, stale_s: seconds between the signs of life, and without one until another machine may take the lease.
        ending_s: how long to wait for a run of this machine whose launcher is gone.
    """

    def __init__(
        self, path: Path, *, beat_s: float = BEAT_S, stale_s: float = STALE_S, ending_s: float = ENDING_S
    ) -> None:
        self.path = path
        self._beat_s, self._stale_s, self._ending_s = beat_s, stale_s, ending_s
        self._ours = {
            "run": secrets.token_hex(8),
            "host": socket.gethostname(),
            "boot": _boot(),
            "pid": os.getpid(),
            "launcher": os.getppid() if "RANK" in os.environ else None,
        }
        self._descriptor: int | None = None
        self._lost: str | None = None
        self._given_back = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="run-folder-lease")

    def take(self, say: Callable[[str], None]) -> None:
        """Take the lease.

        Args:
            say: is told when there is someone to wait for.

        Raises:
            InputError: another run has it.
            OSError: the file cannot be written.
        """
        taken = False
        while not taken:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                locks = self._lock(descriptor, say)
                # Whoever had it may have removed the file meanwhile: then this is the lock of nothing.
                taken = self._is_in_place(descriptor)
                if taken:
                    holder = _holder(descriptor)
                    if holder and not self._is_dead(holder, locks):
                        self._wait_for_silence(descriptor, holder, say)
                    self._write(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if not taken:
                os.close(descriptor)
        self._descriptor = descriptor
        self._thread.start()

    def check(self) -> None:
        """Raise LeaseLostError where another run has taken the lease: this one was silent for too long."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):  # a folder that is away: whoever writes there finds out
                self._is_taken_over()
        if self._lost is not None:
            raise LeaseLostError(self._lost)

    def give_back(self) -> None:
        """Let the next run have it at once; nothing where it was not taken."""
        self._given_back.set()
        if self._descriptor is None:
            return
        self._thread.join()
        with contextlib.suppress(OSError):  # the folder may be gone; the lock ends all the same
            if not self._is_taken_over():
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def _lock(self, descriptor: int, say: Callable[[str], None]) -> bool:
        """Lock the file; False where the file system knows no locks."""
        deadline = time.monotonic() + self._ending_s
        waits = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(descriptor)
                # Its ranks have seen that, too: they write a checkpoint and end.
                ends = holder.get("boot") == self._ours["boot"] and not _is_alive(holder.get("launcher"))
                if not ends or time.monotonic() > deadline:
                    raise self._taken(holder) from None
                if not waits:
                    say(f"waiting for {_describe(holder)}, whose launcher is gone, to write its last checkpoint")
                waits = True
                time.sleep(_POLL_S)
            except OSError:
                return False
            else:
                return True

    def _is_in_place(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(self.path.stat(), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def _is_dead(self, holder: dict[str, Any], locks: bool) -> bool:
        """Whether the holder was on this machine, and is known to be dead."""
        here = holder.get("boot") == self._ours["boot"]
        return here and (locks or not _is_alive(holder.get("pid")))

    def _wait_for_silence(self, descriptor: int, holder: dict[str, Any], say: Callable[[str], None]) -> None:
        """Return when the holder, on another machine, has given no sign for long enough."""
        last = os.fstat(descriptor).st_mtime_ns
        silent_s = (self._time_there_ns() - last) / 1e9
        left_s = min(self._stale_s, self._stale_s - silent_s)
        if left_s <= 0:
            return
        say(f"waiting {left_s:.0f} s for a sign of {_describe(holder)}")
        deadline = time.monotonic() + left_s
        while time.monotonic() < deadline:
            time.sleep(min(_POLL_S, self._beat_s))
            with open(self.path, "rb") as file:  # opening it asks a network file system for the latest
                if os.fstat(file.fileno()).st_mtime_ns != last:
                    raise self._taken(holder)

    def _taken(self, holder: dict[str, Any]) -> InputError:
        return InputError(
            f"training.run_folder={self.path.parent} is in use by {_describe(holder)}: wait until that has ended, or "
            f"choose another run folder"
        )

    def _time_there_ns(self) -> int:
        """The time by the clock that stamps files in the folder, which may be another machine's."""
        probe = self.path.with_name(f"{self.path.name}.{self._ours['run']}")
        probe.touch()
        try:
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink()

    def _write(self, descriptor: int) -> None:
        # Padded: whoever reads meanwhile never finds the end of an older, longer text.
        os.pwrite(descriptor, json.dumps(self._ours).encode().ljust(_MAX_BYTES // 8) + b"\n", 0)
        os.fsync(descriptor)

    def _is_taken_over(self) -> bool:
        """Whether another run has written itself in, or has a file of its own in this one's place."""
        assert self._descriptor is not None
        try:
            with open(self.path, "rb") as file:  # opening it asks a network file system for the latest
                holder = _holder(file.fileno())
        except FileNotFoundError:
            return False  # the folder is gone, and nobody took it
        if holder.get("run") == self._ours["run"]:
            return False
        self._lost = (
            f"run folder {self.path.parent} was taken by {_describe(holder)} while this run gave no sign for "
            f"{self._stale_s:.0f} s or more: this run writes nothing more there"
        )
        return True

    def _beat(self) -> None:
        assert self._descriptor is not None
        while not self._given_back.wait(self._beat_s):
            with contextlib.suppress(OSError):  # a full or silent disk: the next beat tries again
                if self._is_taken_over():
                    return
                os.utime(self._descriptor)


def _holder(descriptor: int) -> dict[str, Any]:
    """What stands in the file; {} for an empty one. One that nobody can read counts as held by someone unknown."""
    text = os.pread(descriptor, _MAX_BYTES, 0)
    if not text.strip():
        return {}
    try:
        holder = json.loads(text)
    except (ValueError, RecursionError):
        holder = None
    return holder if isinstance(holder, dict) else {"run": None}


def _describe(holder: dict[str, Any]) -> str:
    if not holder.get("run"):
        return "another run"
    return f"run {holder['run']} (process {holder.get('pid')} on {holder.get('host')})"


def _is_alive(pid: Any) -> bool:
    """Whether a process of this machine lives; True where nothing is known of it."""
    if not isinstance(pid, int) or not 0 < pid < 1 << 31:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot() -> str:
    """This start of this machine: its processes of before are gone."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
