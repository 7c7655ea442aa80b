"""The ranks of node.py: a process group for each preset, whose faults end that preset alone; Ctrl-C at any moment."""

import gc
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
_POLL_S = 0.2
INTERRUPTED = 130


class NodeRanks:
    """This rank among those that torchrun started.

    Args:
        device: of this rank.
        timeout_s: of a collective; the last resort where a rank is gone without a word.

    Attributes:
        rank, world_size: of all that were started.
    """

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        self._store, self.rank, self.world_size = next(iter(dist.rendezvous("env://")))
        self._device, self._timeout = device, timedelta(seconds=timeout_s)
        self._task = 0
        self._running = False
        self.interrupted: Callable[[], None] = lambda: None
        """What rank 0 does on Ctrl-C, in a thread of its own, before all ends."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Python's own handler waits until a collective returns; the byte is there at once.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.set_wakeup_fd(writer)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def run(self, num_ranks: int, function: Callable[[], T]) -> tuple[T | None, str]:
        """(function(), "") on the first num_ranks ranks, in a process group of their own; the others wait for them.

        Where it raises on a rank, the groups of the others are cut, so that none waits for it: (None, the first fault).
        """
        self._task += 1
        if self.rank >= num_ranks:
            while not self._store.check([self._key("done")]):
                time.sleep(_POLL_S)
            return None, ""
        result, fault = None, ""
        self._running = True
        try:
            self._join(num_ranks)
            result = function()
            dist.barrier()  # all have come so far
        except Exception as error:  # whatever it is: the others must hear of it, or they wait for ever
            fault = self._report(error)
        self._running = False
        self._leave(bool(fault))
        if self.rank == 0:
            self._store.set(self._key("done"), "1")
        return (None, fault) if fault else (result, "")

    def _join(self, num_ranks: int) -> None:
        backend = "cpu:gloo,cuda:nccl" if self._device.type == "cuda" else "gloo"
        store = dist.PrefixStore(self._key("group"), self._store)
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=num_ranks, timeout=self._timeout,
            device_id=self._device if self._device.type == "cuda" else None,
        )  # fmt: skip

    def _report(self, error: Exception) -> str:
        """The first fault of the preset: this one, or that of another rank which led to it."""
        text = f"rank {self.rank}: {describe(error)}"
        known = self._store.compare_set(self._key("fault"), "", text)
        return known.decode()

    def _leave(self, failed: bool) -> None:
        """Out of all groups; after a fault without waiting for anyone."""
        if failed:
            _cut_groups()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _key(self, what: str) -> str:
        return f"node/{self._task}/{what}"

    def _watch(self, reader: int) -> None:
        """Until the end: Ctrl-C, and faults of other ranks."""
        while True:
            ready, _, _ = select.select([reader], [], [], _POLL_S)
            if ready and signal.SIGINT in os.read(reader, 64):
                if self.rank == 0:
                    self.interrupted()
                os._exit(INTERRUPTED)
            if self._running and self._failed_elsewhere():
                _cut_groups()

    def _failed_elsewhere(self) -> bool:
        try:
            return self._store.check([self._key("fault")])
        except RuntimeError:  # the store is gone, and torchrun with it: nobody would ever end this rank
            os._exit(1)


def describe(error: Exception) -> str:
    """One line."""
    text = next(iter(str(error).splitlines()), "")[:200]
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"out of memory ({text})"
    return f"{type(error).__name__}: {text}"


def _cut_groups() -> None:
    """Collectives that run raise, here and on the peers; without waiting for anyone."""
    for group in list(dist.distributed_c10d._world.pg_map):
        try:
            group.abort()
        except RuntimeError:
            continue
