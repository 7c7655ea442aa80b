"""Hooks of a pipeline: functions of the caller that the schedule calls for a stage (reduce, unshard, reshard, update).

The ranks of a data-parallel group have the same list of actions, so they call the hooks in the same order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Wait = Callable[[], None]
"""Waits until the communication that a hook started is done."""


class StageHooks(Protocol):
    """Functions that a PipelineExecutor calls with the index of a stage.

    `reduce` and `unshard` may start a communication and return a function that waits for it. An action that needs the
    result calls this function; the rank's other actions continue meanwhile.
    """

    def reduce(self, stage: int) -> Wait | None:
        """REDUCE_GRAD: sum the gradients of the stage, which are complete, over data-parallel ranks."""

    def unshard(self, stage: int) -> Wait | None:
        """UNSHARD: gather the full weights of the stage; its next computation waits for them.

        The parameters must stay the same objects. There may be a RESHARD and another UNSHARD between a forward and its
        backward. So the full weights must return to the same memory: free and fill a parameter's storage, and do not
        replace it. Keep the version counter, or autograd raises (torch.autograd._unsafe_preserve_version_counter).
        """

    def reshard(self, stage: int) -> None:
        """RESHARD: keep only this rank's shard."""

    def update(self, stage: int, index: int) -> None:
        """UPDATE, in asynchronous schedules: run optimizer step number `index` of the stage, and zero its gradients."""


def do_nothing(*_: int) -> None:
    """Default hook, which does nothing."""


@dataclass(frozen=True)
class StageFunctions:
    """StageHooks made of functions; the default of each does nothing."""

    reduce: Callable[[int], Wait | None] = do_nothing
    unshard: Callable[[int], Wait | None] = do_nothing
    reshard: Callable[[int], None] = do_nothing
    update: Callable[[int, int], None] = do_nothing
