"""Two network namespaces and a cable between them: two machines, so far as sockets can tell. Needs root on Linux."""

import os
import shutil
import subprocess
import sys
from types import TracebackType

DEVICE = "veth0"


class TwoHosts:
    """A context in which they are there.

    Attributes:
        addresses: of each.
    """

    def __init__(self) -> None:
        self.names = [f"fm-{os.getpid()}-{host}" for host in range(2)]
        self.addresses = [f"10.231.78.{host + 1}" for host in range(2)]

    def __enter__(self) -> "TwoHosts":
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
        """Words before a command that runs on one of them."""
        return ["ip", "netns", "exec", self.names[host]]

    def pull_the_cable(self) -> None:
        """No packet gets through from now on, and nobody is told."""
        ip("-n", self.names[0], "link", "set", DEVICE, "down")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def missing() -> str | None:
    """Why there can be none here."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if shutil.which("ip") is None:
        return "ip is not installed (Debian: apt-get install iproute2)"
    probe = f"fm-{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return f"no network namespaces here: {done.stderr.strip()}" if done.returncode else None
