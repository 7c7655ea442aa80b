"""Ranks of node.py: a process group for each task, so that a fault ends only its task; Ctrl-C at any moment."""

import gc
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from fused_megatron.checks import first_line

T = TypeVar("T")
INTERRUPTED = 130
_POLL_S = 0.2
_MESSAGE_CHARACTERS = 200  # length of an error message
_FAILED = "FUSED_MEGATRON_NODE_FAILED"  # the task at which a rank failed, before this process restarted


class NodeRanks:
    """This rank among the ranks that torchrun started.

    A rank that waits in a collective cannot be interrupted reliably. So when a rank fails, all ranks of the task
    replace themselves with new processes (exec). These keep torchrun's store and read from it which tasks are done.
    This cuts every connection and frees all memory, for any backend.

    Args:
        device: device of this rank.
        timeout_s: limit of a collective; the last resort if a rank is lost without a message.

    Attributes:
        rank, world_size: this rank and the number of all ranks.
        resumed: whether this process continues after a fault.
        interrupted: function that rank 0 calls on Ctrl-C, in a separate thread, before the end.
    """

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        self._store, self.rank, self.world_size = next(iter(dist.rendezvous("env://")))
        self._device, self._timeout = device, timedelta(seconds=timeout_s)
        self._failed = os.environ.pop(_FAILED, None)
        self.resumed = self._failed is not None
        self._running: str | None = None
        self._handover = threading.Lock()
        self.interrupted: Callable[[], None] = lambda: None
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # Python's own handler waits until a collective returns; the byte arrives at once.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.set_wakeup_fd(writer)
        # A separate store: a wait of the main thread would block a shared one.
        threading.Thread(target=self._watch, args=(reader, self._store.clone()), daemon=True).start()

    def run(self, task: str, num_ranks: int, function: Callable[[], T]) -> tuple[T | None, str]:
        """Call the function on the first num_ranks ranks, in their own process group; the other ranks wait.

        Returns (result, ""). If the function raises on a rank: (None, the first fault). If the task was done before a
        fault: (None, "").

        Args:
            task: a unique name.
        """
        if self.rank >= num_ranks:
            while not self._store.check([self._key(task, "done")]):
                time.sleep(_POLL_S)
        if self._store.check([self._key(task, "done")]):
            return None, ""
        if self._failed == task:
            self._done(task)
            return None, self._store.get(self._key(task, "fault")).decode()
        self._running = task
        try:
            self._join(task, num_ranks)
            result = function()
            dist.barrier()  # all ranks have finished
        except Exception as error:  # any error: the other ranks must learn of it, or they wait forever
            with self._handover:
                self._store.compare_set(self._key(task, "fault"), "", f"rank {self.rank}: {describe(error)}")
                _start_anew(task)
        with self._handover:
            self._running = None
        dist.destroy_process_group()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._done(task)
        return result, ""

    def _join(self, task: str, num_ranks: int) -> None:
        backend = "cpu:gloo,cuda:nccl" if self._device.type == "cuda" else "gloo"
        store = dist.PrefixStore(self._key(task, "group"), self._store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=num_ranks, timeout=self._timeout)

    def _done(self, task: str) -> None:
        if self.rank == 0:
            self._store.set(self._key(task, "done"), "1")

    def _key(self, task: str, what: str) -> str:
        return f"node/{task}/{what}"

    def _watch(self, reader: int, store: dist.Store) -> None:
        """Watch for Ctrl-C and for faults of other ranks, until the end."""
        while True:
            ready, _, _ = select.select([reader], [], [], _POLL_S)
            if ready and signal.SIGINT in os.read(reader, 64):
                if self.rank == 0:
                    self.interrupted()
                os._exit(INTERRUPTED)
            with self._handover:
                if self._running is None:
                    continue
                try:
                    if store.check([self._key(self._running, "fault")]):
                        _start_anew(self._running)
                except RuntimeError:  # the store and torchrun are gone: nothing else would end this rank
                    os._exit(1)


def describe(error: Exception) -> str:
    """Return the error as one line."""
    text = first_line(error, name_type=False)[:_MESSAGE_CHARACTERS]
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"out of memory ({text})"
    return first_line(error)[:_MESSAGE_CHARACTERS]


def _start_anew(failed: str) -> None:
    """Replace this process with a new one of the same program and process id."""
    os.environ[_FAILED] = failed
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
