"""Reports of waits for other ranks to an observer; without an observer they cost nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

COMMUNICATION, BUBBLE = "communication", "bubble"
"""Kinds of waits: for a collective, and of a pipeline stage for another stage."""
OPTIMIZER = "optimizer"
"""The update of the weights: no wait, but a part of the step that observers time in the same way."""

T = TypeVar("T")


class WaitObserver(Protocol):
    """Receiver of the reports."""

    def wait(self, part: str, function: Callable[[], T]) -> T:
        """Call function, which waits for other ranks, and return its result."""


_observer: ContextVar[WaitObserver | None] = ContextVar("fused_megatron_wait_observer", default=None)


def wait_for(part: str, function: Callable[[], T]) -> T:
    """Call function, which waits for other ranks, through the observer of this context if there is one.

    Args:
        part: COMMUNICATION, BUBBLE or OPTIMIZER.
    """
    observer = _observer.get()
    return function() if observer is None else observer.wait(part, function)


@contextmanager
def observed_by(observer: WaitObserver | None) -> Iterator[None]:
    """Report the waits of this thread inside the block to the observer; None: report them to nobody."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)
