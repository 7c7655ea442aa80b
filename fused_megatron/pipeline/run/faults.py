"""Faults of a pipeline: a shared record of the first one, and the errors that report it on every rank."""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from fused_megatron.checks import first_line
from fused_megatron.pipeline.schedule.action import Action, Schedule

_KEY = "fault"
_PATIENCE_S = 1.0


class PipelineError(RuntimeError):
    """Error of a pipeline that cannot continue because of another rank.

    Attributes:
        rank: the rank of the pipeline that failed or is gone; -1 if unknown.
        action: text of the action in which it failed; None if it is gone or was in no action.
    """

    def __init__(self, message: str, rank: int, action: str | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.action = action


class PeerLost(Exception):
    """Failure of a message or collective. The executor catches it and finds the cause.

    Attributes:
        rank: rank of the peer; None for a collective.
    """

    def __init__(self, rank: int | None, error: Exception) -> None:
        super().__init__(str(error))
        self.rank = rank


@contextmanager
def lost_peers(rank: int | None = None) -> Iterator[None]:
    """Raise errors of torch.distributed as PeerLost."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(rank, error) from error


class FaultRecord:
    """Record of the first fault of a pipeline, in the store of its ranks. Read only after a connection broke."""

    def __init__(self, store: dist.Store | None) -> None:
        self._store = store

    @property
    def readable(self) -> bool:
        """Whether the store still answered."""
        return self._store is not None

    def write(self, rank: int, action: str | None, text: str) -> None:
        """Record a fault, unless there is one already. A store that is gone or silent is no further fault."""
        self._asked(lambda store: store.compare_set(_KEY, "", json.dumps([rank, action, text])))

    def read(self) -> tuple[int, str | None, str] | None:
        """Return (rank, action, text of the error) of the first fault; None if none is known."""
        found = self._asked(lambda store: store.get(_KEY) if store.check([_KEY]) else None)
        if found is None:
            return None
        rank, action, text = json.loads(found)
        return rank, action, text

    def _asked(self, ask: Callable[[dist.Store], bytes | None]) -> bytes | None:
        """Return the answer of the store; None if it is gone or silent, and then it is never asked again.

        The rank that keeps the store may be stopped. Calls of the store then wait without end, so a thread makes them.
        """
        store, answers = self._store, []
        if store is None:
            return None

        def call() -> None:
            with contextlib.suppress(Exception):  # the user must see the first fault, not this one
                answers.append(ask(store))

        thread = threading.Thread(target=call, daemon=True, name="pipeline-fault")
        thread.start()
        thread.join(_PATIENCE_S)
        if not answers:
            self._store = None
            return None
        return answers[0]


def marked_grid(schedule: Schedule, rank: int, action: Action, around: int = 6) -> str:
    """Return the actions of all ranks near an action of one rank, as text with this action marked."""
    position = schedule.actions[rank].index(action)
    first = max(0, position - around)
    rows = [[str(each) for each in actions[first : position + around + 1]] for actions in schedule.actions]
    rows[rank][position - first] = f">>{action}<<"
    width = max(len(cell) for cells in rows for cell in cells)
    lines = [f"rank {row}  " + " ".join(cell.ljust(width) for cell in cells) for row, cells in enumerate(rows)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def print_fault(schedule: Schedule, rank: int, action: Action, error: BaseException) -> None:
    """Print the fault, with its place in the schedule, to standard error."""
    head = f"pipeline {schedule.name}, rank {rank}: {action} failed: {first_line(error)}\n"
    sys.stderr.write(head + marked_grid(schedule, rank, action))
