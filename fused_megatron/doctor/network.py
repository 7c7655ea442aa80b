"""Facts about the network that ranks need: fast name look-ups, interfaces, and a trial of gloo."""

import contextlib
import importlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from fused_megatron.doctor.facts import Network

# A name server without an answer blocks its caller for a multiple of 5 s; the doctor does not wait that long.
LOOKUP_PATIENCE_S = 1.5
_LOOPBACK_PATIENCE_S = 1.0
_SIOCGIFADDR = 0x8915


class Lookup:
    """A call of a function that may hang, in its own daemon thread."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._begun = time.monotonic()
        self._result: Any = None
        self._seconds: float | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            self._result = self._function()
        self._seconds = time.monotonic() - self._begun

    def result(self) -> tuple[Any, float | None]:
        """Return (result or None, seconds); seconds is None if the function did not end in time."""
        self._thread.join(max(0.0, self._begun + LOOKUP_PATIENCE_S - time.monotonic()))
        seconds = self._seconds
        return (None if seconds is None else self._result), seconds


class Lookups:
    """The two name look-ups that can stall starting ranks, started at once."""

    def __init__(self) -> None:
        self.hostname = socket.gethostname()
        self.host = Lookup(lambda: sorted({str(info[4][0]) for info in socket.getaddrinfo(self.hostname, None)}))
        # A TCPStore looks up this name for each of its clients.
        self.localhost = Lookup(lambda: socket.getnameinfo(("127.0.0.1", 0), 0))


def find_network(lookups: Lookups, gloo: bool) -> Network:
    """Gather names and interfaces, and let two ranks add numbers over gloo.

    Args:
        lookups: the name look-ups, already started.
        gloo: torch works and has gloo.
    """
    addresses, host_s = lookups.host.result()
    _, localhost_s = lookups.localhost.result()
    # A gloo group looks up the host's name too, so the trial would stall if that look-up does.
    error, ms = loopback_check() if gloo and host_s is not None else (None, None)
    return Network(
        hostname=lookups.hostname,
        interfaces=_interfaces(),
        host_addresses=tuple(addresses or ()),
        local_addresses=tuple(filter(_is_local, addresses or ())),
        host_lookup_s=host_s,
        localhost_lookup_s=localhost_s,
        loopback_error=error,
        loopback_ms=ms,
    )


def _interfaces() -> dict[str, str]:
    names = [name for _, name in socket.if_nameindex()]
    if not sys.platform.startswith("linux"):
        return dict.fromkeys(names, "")
    return {name: _address(name) for name in names}


def _address(interface: str) -> str:
    fcntl: Any = importlib.import_module("fcntl")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(found[20:24])


def _is_local(address: str) -> bool:
    """Whether the address belongs to this machine; gloo must skip other addresses."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def loopback_check() -> tuple[str | None, float | None]:
    """Let two gloo ranks, threads of this process, add two numbers; return (error or None, milliseconds or None)."""
    torch, dist = importlib.import_module("torch"), importlib.import_module("torch.distributed")
    store = dist.HashStore()
    errors: list[str] = []
    sums: list[float] = []

    def rank(index: int) -> None:
        try:
            timeout = importlib.import_module("datetime").timedelta(seconds=_LOOPBACK_PATIENCE_S)
            group = dist.ProcessGroupGloo(store, index, 2, timeout)
            number = torch.full((1,), index + 1.0)
            group.allreduce([number]).wait()
            sums.append(number.item())
        except Exception as error:  # gloo's message, whatever it is, becomes the finding
            errors.append(" ".join(str(error).split())[:200])

    begun = time.monotonic()
    threads = [threading.Thread(target=rank, args=(index,), daemon=True) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, begun + 1.5 * _LOOPBACK_PATIENCE_S - time.monotonic()))
    if errors:
        return errors[0], None
    if sums != [3.0, 3.0]:
        return f"no answer within {1.5 * _LOOPBACK_PATIENCE_S:g} s", None
    return None, 1e3 * (time.monotonic() - begun)
