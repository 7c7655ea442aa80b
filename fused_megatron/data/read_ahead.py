"""Reading of the next batch by a thread while the training step computes."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

THREAD_NAME = "read-ahead"
_END_S = 5.0
"""Longest wait for the thread at the end of a run: a file system that hangs must not keep the process alive."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Read(Generic[T]):
    value: T | None
    error: BaseException | None


class ReadAhead(Generic[T]):
    """Values of a function of a position, each read by a thread before the caller needs it.

    The caller states the position that follows, and take() returns the value of the position that it asks for. So the
    values do not depend on what was read ahead: after a resume, or a jump, the value is read when it is asked for.

        with ReadAhead(read, device) as batches:
            for position in range(0, 100, 10):
                batch = batches.take(position, following=position + 10 if position < 90 else None)

    Between entry and exit only the thread calls `read`, one call at a time. Outside, take() calls it itself.

    Args:
        read: returns the value at a position.
        device: of the run: a thread that pins memory must use the GPU of its process.
    """

    def __init__(self, read: Callable[[int], T], device: torch.device) -> None:
        self._read, self._device = read, device
        self._asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[_Read[T]] = queue.SimpleQueue()
        self._ahead: int | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "ReadAhead[T]":
        # A daemon: the process can end although a read does not return.
        self._thread = threading.Thread(target=self._run, daemon=True, name=THREAD_NAME)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._thread is not None
        self._asked.put(None)
        self._thread.join(_END_S)
        # Queues of its own for the next thread: one that is still reading keeps the old ones.
        self._thread, self._ahead = None, None
        self._asked, self._found = queue.SimpleQueue(), queue.SimpleQueue()

    def take(self, position: int, following: int | None) -> T:
        """Return the value at a position, and let the thread read the one that follows.

        Args:
            position: where to read.
            following: the position of the next take(); None: there is none.

        Raises:
            Any error of `read` at this position, in the thread of the caller.
        """
        if self._thread is None:
            return self._read(position)
        if self._ahead not in (None, position):
            self._found.get()
        if self._ahead != position:
            self._asked.put(position)
        self._ahead = None
        read: Any = self._found.get()
        if read.error is not None:
            raise read.error
        if following is not None:
            self._ahead = following
            self._asked.put(following)
        value: T = read.value
        return value

    def _run(self) -> None:
        asked, found = self._asked, self._found
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while (position := asked.get()) is not None:
            try:
                found.put(_Read(self._read(position), None))
            except BaseException as error:  # of any class: the caller raises it
                found.put(_Read(None, error))
