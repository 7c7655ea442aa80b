"""Lease of a run folder, which lets only one run at a time write there."""

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
from fused_megatron.untrusted_files import open_plain_file

# The holder of a lease touches the file every BEAT_S seconds. After STALE_S without a touch a run on another machine
# may take the lease. STALE_S is several BEAT_S, since a network file system may not answer for some seconds.
BEAT_S = 5.0
STALE_S = 30.0
# Time for a run whose launcher was killed to write its last checkpoint.
ENDING_S = 90.0
_POLL_S = 0.2
# Network file systems keep what they know of a folder for up to a minute.
_SEEN_S = 60.0
_MAX_BYTES = 4096


class LeaseLostError(CheckpointError):
    """Another run has taken the run folder."""


class Lease:
    """Right to write in a run folder, recorded in a file that names the holder.

    On one machine the system's lock of the file decides. It ends with the process, so a killed run blocks no other. On
    some shared file systems a lock does not reach other machines. Therefore the holder also touches the file every few
    seconds, and a run on another machine takes the lease if the file has not been touched for long enough.

    Args:
        path: of the file.
        beat_s: seconds between two touches of the file.
        stale_s: seconds without a touch after which a run on another machine may take the lease.
        ending_s: seconds to wait for a run of this machine whose launcher is gone.

    Attributes:
        run: name of this run in the file.
    """

    def __init__(
        self, path: Path, *, beat_s: float = BEAT_S, stale_s: float = STALE_S, ending_s: float = ENDING_S
    ) -> None:
        self.path = path
        self._beat_s, self._stale_s, self._ending_s = beat_s, stale_s, ending_s
        self.run = secrets.token_hex(8)
        self._ours = {
            "run": self.run,
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
            say: called with a line of text if this run must wait for another one.

        Raises:
            InputError: another run holds the lease, or the file cannot be written.
        """
        try:
            self._descriptor = self._locked(say)
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written: {error.strerror or error} (repair that, or choose another "
                "training.run_folder)"
            ) from None
        self._thread.start()

    def check_seen(self, run: str, wait_s: float = _SEEN_S) -> None:
        """Raise InputError unless the file names this run, so that every rank writes into one folder.

        Args:
            run: `Lease.run` of the rank that took the lease.
            wait_s: time for a network file system to show the file on this machine.
        """
        deadline = time.monotonic() + wait_s
        while True:
            with contextlib.suppress(OSError), open(open_plain_file(self.path, follow_links=False), "rb") as file:
                if _holder(file.fileno()).get("run") == run:
                    return
            if time.monotonic() > deadline:
                raise InputError(
                    f"training.run_folder={self.path.parent} on {socket.gethostname()} is not rank 0's folder "
                    "(all ranks need one shared folder)"
                )
            time.sleep(_POLL_S)

    def _locked(self, say: Callable[[str], None]) -> int:
        """Open, lock and write the file; return its descriptor."""
        taken = False
        while not taken:
            descriptor = open_plain_file(self.path, follow_links=False, write=True)
            try:
                locks = self._lock(descriptor, say)
                # The last holder may have removed the file meanwhile. Then the lock is of no use: open the new file.
                taken = self._is_at_path(descriptor)
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
        return descriptor

    def check(self) -> None:
        """Raise LeaseLostError if another run has taken the lease, since this one did not touch it for too long."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):  # the folder cannot be reached: the next write there reports it
                self._is_taken_over()
        if self._lost is not None:
            raise LeaseLostError(self._lost)

    def give_back(self) -> None:
        """Release the lease, so that the next run can take it at once; do nothing if it was not taken."""
        self._given_back.set()
        if self._descriptor is None:
            return
        self._thread.join()
        with contextlib.suppress(OSError):  # the folder may be gone; closing the file ends the lock anyway
            if not self._is_taken_over():
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def _lock(self, descriptor: int, say: Callable[[str], None]) -> bool:
        """Lock the file; return False if the file system has no locks."""
        deadline = time.monotonic() + self._ending_s
        waits = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(descriptor)
                # The holder's ranks also notice that their launcher is gone: they write a checkpoint and end.
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

    def _is_at_path(self, descriptor: int) -> bool:
        """Return whether the open file is the one at self.path."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def _is_dead(self, holder: dict[str, Any], locks: bool) -> bool:
        """Return whether the holder was a process of this machine that no longer lives."""
        here = holder.get("boot") == self._ours["boot"]
        return here and (locks or not _is_alive(holder.get("pid")))

    def _wait_for_silence(self, descriptor: int, holder: dict[str, Any], say: Callable[[str], None]) -> None:
        """Wait until the holder, on another machine, has not touched the file for stale_s; raise if it touches it."""
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
        """Return the time by the clock that stamps files in the folder, which may be another machine's clock."""
        probe = self.path.with_name(f"{self.path.name}.{self._ours['run']}")
        probe.touch()
        try:
            return probe.stat().st_mtime_ns
        finally:
            probe.unlink()

    def _write(self, descriptor: int) -> None:
        # Padded, so that a concurrent reader never finds the end of an older, longer text.
        text = json.dumps(self._ours).encode().ljust(_MAX_BYTES // 8) + b"\n"
        os.pwrite(descriptor, text, 0)
        os.ftruncate(descriptor, len(text))
        os.fsync(descriptor)

    def _is_taken_over(self) -> bool:
        """Return whether another run has written its name into the file, or has replaced the file."""
        assert self._descriptor is not None
        try:
            with open(self.path, "rb") as file:  # opening it asks a network file system for the latest
                holder = _holder(file.fileno())
        except FileNotFoundError:
            return False  # the folder is gone, and no run took the lease
        if holder.get("run") == self._ours["run"]:
            return False
        self._lost = (
            f"run folder {self.path.parent} was taken by {_describe(holder)} while this run gave no sign for "
            f"{self._stale_s:.0f} s or more: this run writes nothing more there"
        )
        return True

    def _beat(self) -> None:
        """Touch the file every beat_s seconds until the lease is given back or lost."""
        assert self._descriptor is not None
        while not self._given_back.wait(self._beat_s):
            with contextlib.suppress(OSError):  # a full disk or one that does not answer: the next beat tries again
                if self._is_taken_over():
                    return
                os.utime(self._descriptor)


def _holder(descriptor: int) -> dict[str, Any]:
    """Return the holder that the file names: {} for an empty file, {"run": None} for a file that cannot be parsed."""
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
    """Return whether a process of this machine lives; True if that cannot be known."""
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
    """Return an identifier of this machine's latest boot, which ended all earlier processes."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
