"""Waits for other ranks: whatever waits tells an observer, if there is one; else a wait costs nothing more."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

COMMUNICATION, BUBBLE = "communication", "bubble"
"""A wait for a collective, and one of a pipeline stage for another stage."""

T = TypeVar("T")


class WaitObserver(Protocol):
    """Who wants to know of the waits."""

    def wait(self, part: str, function: Callable[[], T]) -> T:
        """Call function, which waits, and return its result."""


_observer: ContextVar[WaitObserver | None] = ContextVar("fused_megatron_wait_observer", default=None)


def wait_for(part: str, function: Callable[[], T]) -> T:
    """function(), which waits for other ranks; through the observer of this context, if there is one.

    Args:
        part: COMMUNICATION or BUBBLE.
    """
    observer = _observer.get()
    return function() if observer is None else observer.wait(part, function)


@contextmanager
def observed_by(observer: WaitObserver | None) -> Iterator[None]:
    """Let the observer see the waits of what runs inside in this thread; None: let nobody see them."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)
