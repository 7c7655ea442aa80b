"""Two network namespaces joined by a cable: two machines, as far as sockets can tell. Needs root on Linux."""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

DEVICE = "veth0"
_NAMES = "/run/netns"
"""Folder in which iproute2 keeps the names."""
_OWN_NAME = re.compile(r"fm-([0-9]+)-[01]")


class TwoHosts:
    """A context in which both namespaces exist.

    Args:
        prefix: of their names; None for one that no other process has. Leftovers of the same names, and
            of processes that were killed, are removed first.

    Attributes:
        names, addresses: of each namespace.
    """

    def __init__(self, prefix: str | None = None) -> None:
        prefix = prefix or f"fm-{os.getpid()}"
        self.names = [f"{prefix}-{host}" for host in range(2)]
        self.addresses = [f"10.231.78.{host + 1}" for host in range(2)]

    def __enter__(self) -> "TwoHosts":
        self._remove()
        _remove_leftovers()
        try:
            for name in self.names:
                ip("netns", "add", name)
            ends = ["netns", self.names[0], "type", "veth", "peer", "name", DEVICE, "netns", self.names[1]]
            ip("link", "add", DEVICE, *ends)
            for name, address in zip(self.names, self.addresses, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
                ip("-n", name, "link", "set", DEVICE, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def on(self, host: int) -> list[str]:
        """Return the words before a command that runs on one of them."""
        return ["ip", "netns", "exec", self.names[host]]

    def limit(self, mbit_per_s: float) -> None:
        """Limit the cable to this many 10^6 bits per second, in both directions."""
        for name in self.names:
            limit_device(mbit_per_s, name)

    def pull_the_cable(self) -> None:
        """Stop all packets from now on; neither side is told."""
        ip("-n", self.names[0], "link", "set", DEVICE, "down")


def _remove_leftovers() -> None:
    """Remove the namespaces of processes that ended without doing so."""
    with contextlib.suppress(FileNotFoundError):  # no namespace was ever made
        for name in os.listdir(_NAMES):
            owner = _OWN_NAME.fullmatch(name)
            if owner is not None and not os.path.exists(f"/proc/{owner[1]}"):
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def limit_device(mbit_per_s: float | None, host: str | None = None) -> None:
    """Limit what a host sends over the cable; at most 256 KiB pass at once.

    Args:
        mbit_per_s: 10^6 bits per second; None: no limit.
        host: name of the namespace; None: the one of this thread.
    """
    tc = ["tc", *(["-n", host] if host is not None else []), "qdisc"]
    if mbit_per_s is None:
        subprocess.run([*tc, "delete", "dev", DEVICE, "root"], capture_output=True)  # fails where there is no limit
        return
    rate = ["rate", f"{mbit_per_s:g}mbit", "burst", "256kb", "latency", "50ms"]
    subprocess.run([*tc, "replace", "dev", DEVICE, "root", "tbf", *rate], check=True, capture_output=True)


def enter_host(name: str) -> None:
    """Move this thread, and the threads that it starts from now on, into a namespace.

    Raises:
        OSError: no such namespace, or no right to enter it.
    """
    descriptor = os.open(f"{_NAMES}/{name}", os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), name)
    finally:
        os.close(descriptor)


def sent_bytes() -> int:
    """Return the bytes that the end of the cable in this process's namespace has sent, headers included."""
    # /sys shows the namespace of whoever mounted it, /proc/self the namespace of this process.
    with open("/proc/self/net/dev", encoding="ascii") as file:
        for line in file:
            name, _, counts = line.partition(":")
            if name.strip() == DEVICE:
                return int(counts.split()[8])
    raise OSError(f"{DEVICE} is not in this namespace")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def missing(tools: Sequence[str] = ("ip",)) -> str | None:
    """Return why this machine can have no namespaces, or lacks one of the tools; None if nothing is missing."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    absent = [tool for tool in tools if shutil.which(tool) is None]
    if absent:
        return f"{' and '.join(absent)} not found (Debian: apt-get install iproute2)"
    probe = f"fm-{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return f"no network namespaces here: {done.stderr.strip()}" if done.returncode else None
