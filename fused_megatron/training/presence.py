"""Which ranks are gone: known at once, by whoever lost contact, however many ranks stand between."""

import os
import socket
import time

import torch.distributed as dist

# For the system to close the ports of a process that was just killed.
_SETTLE_S = 1.0
_CONNECT_S = 1.0


class LostRankError(RuntimeError):
    """Ranks of the run are gone.

    Attributes:
        ranks: which.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class Presence:
    """An open port of this process, by which the others see that it lives.

    A killed rank breaks only the connections of its neighbours; what they break by leaving is all that the others see.
    So a rank that leaves because of an error writes that down first. A rank whose port is closed and that wrote nothing
    is one that was lost. The system keeps and closes the port: no thread, nothing to do while all is well.

    Communication: a key of the store where the ranks met, at the start; a look at all of them after an error.
    """

    def __init__(self) -> None:
        self._store = None
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
            world = dist.group.WORLD
            assert world is not None
            self._store = dist.PrefixStore("presence", world.get_group_store())
            self._listener = socket.create_server((_own_address(), 0), backlog=128)
            host, port = self._listener.getsockname()[:2]
            self._store.set(f"port {self._rank}", f"{host} {port}")

    def explain(self, error: Exception) -> Exception:
        """A LostRankError where ranks are gone, else the error itself; called before a rank ends with it."""
        ranks = self._lost()
        if not ranks:
            return error
        names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        reason = " ".join(str(error).split())[:200]
        return LostRankError(f"lost contact with {names} ({reason})", tuple(ranks))

    def _lost(self) -> list[int]:
        if self._store is None:
            return []
        try:
            self._store.set(f"left {self._rank}", "1")
            deadline = time.monotonic() + _SETTLE_S
            while not (found := self._silent()) and time.monotonic() < deadline:
                time.sleep(0.05)
            return found
        except RuntimeError:  # the store is gone, with the rank or the launcher that kept it
            return []

    def _silent(self) -> list[int]:
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        closed = [rank for rank in others if not self._answers(rank)]
        # In this order: whoever left has written so before its port closed.
        assert self._store is not None
        return [rank for rank in closed if not self._store.check([f"left {rank}"])]

    def _answers(self, rank: int) -> bool:
        assert self._store is not None
        host, port = self._store.get(f"port {rank}").decode().split()
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        except OSError:
            return False
        return True


def _own_address() -> str:
    """Of the interface that leads to the others."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
