"""Hooks of a pipeline: what the caller does for a stage (reduce, unshard, reshard, update) when the schedule says so.

What the ranks of a data-parallel group do in these, they do in the same order, since all of them have the same list of
actions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Wait = Callable[[], None]
"""Returns when what was started is done."""


class StageHooks(Protocol):
    """What a PipelineExecutor calls for its stages, each by its index.

    `reduce` and `unshard` may start a communication and return how to wait for it: what needs the result waits, and the
    rank's other actions go on meanwhile.
    """

    def reduce(self, stage: int) -> Wait | None:
        """REDUCE_GRAD: sum the stage's gradients, which are complete, over data-parallel ranks."""

    def unshard(self, stage: int) -> Wait | None:
        """UNSHARD: make the stage's weights whole; its next computation waits.

        The parameters must stay the same objects. A backward may come between another UNSHARD and RESHARD than its
        forward: it finds the weights only if they are in the same memory (free and fill a parameter's storage, do not
        replace it), and takes a new version for a fault (torch.autograd._unsafe_preserve_version_counter).
        """

    def reshard(self, stage: int) -> None:
        """RESHARD: keep only this rank's shard."""

    def update(self, stage: int, index: int) -> None:
        """UPDATE, of asynchronous schedules: the optimizer step of the stage, and zeroing; index counts them."""


def do_nothing(*_: int) -> None:
    """The hook of a caller who has none."""


@dataclass(frozen=True)
class StageFunctions:
    """StageHooks made of functions; one that is not given does nothing."""

    reduce: Callable[[int], Wait | None] = do_nothing
    unshard: Callable[[int], Wait | None] = do_nothing
    reshard: Callable[[int], None] = do_nothing
    update: Callable[[int, int], None] = do_nothing
