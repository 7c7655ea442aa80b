"""Older versions of a stage's weights, which microbatches under way still use (asynchronous schedules)."""

from collections.abc import Callable

import torch
from torch import nn

from fused_megatron.pipeline.schedule.action import Schedule, microbatches_of_update, updates_behind


class StashedWeights:
    """Versions of the weights of one stage: the newest, and the last few before it. The parameters hold one at a time.

    Microbatches of update t use the version of update t - `behind`, in this call of the executor and in the next one:
    the update rule does not depend on where the steps are cut into calls. Before the first updates of a training there
    is no version so old, and they use the oldest.

    Args:
        module: the module of the stage.
        stage: index of the stage.
        schedule: defines how old the version of each microbatch is.

    Attributes:
        behind: the number of older versions that are kept.

    Memory: `behind` copies of the weights; the newest version is in the parameters themselves between calls.
    """

    def __init__(self, module: nn.Module, stage: int, schedule: Schedule) -> None:
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._every = microbatches_of_update(schedule)
        self.behind = updates_behind(schedule, stage)
        self._older: list[list[torch.Tensor]] = []  # the oldest first
        self._newest: list[torch.Tensor] | None = None  # in a call; between calls the parameters hold it
        self._updates = 0  # in this call

    @property
    def num_versions(self) -> int:
        """Number of versions that are kept now, the newest included."""
        return 1 + len(self._older)

    def older(self) -> list[dict[nn.Parameter, torch.Tensor]]:
        """Return the older versions by parameter; the first is one update old. For checkpoints."""
        return [dict(zip(self._parameters, values, strict=True)) for values in reversed(self._older)]

    def make_older(self, number: int) -> list[dict[nn.Parameter, torch.Tensor]]:
        """Replace the older versions by a number of copies of the parameters; return them as older(), to be filled."""
        assert self._newest is None and number <= self.behind, "between calls, and no more than the rule reads"
        self._older = [[p.detach().clone() for p in self._parameters] for _ in range(number)]
        return self.older()

    def begin(self) -> None:
        """Begin a call of the executor."""
        self._newest, self._updates = [p.data for p in self._parameters], 0

    def use(self, microbatch: int) -> None:
        """Set the parameters to the version of a microbatch, for one action."""
        assert self._newest is not None
        age = self._updates - (microbatch // self._every - self.behind)
        assert age >= 0, "a microbatch never uses weights that its stage has not made yet"
        versions = [*self._older, self._newest]
        self._show(versions[max(0, len(versions) - 1 - age)])

    def update(self, update: Callable[[], None]) -> None:
        """Set the parameters to the newest version, and make the next version by an update in place."""
        assert self._newest is not None
        if self.behind:
            # Views of a version, which autograd saved, stay as they are: the next version has memory of its own.
            if len(self._older) == self.behind:
                del self._older[0]
            self._older.append(self._newest)
            self._newest = [value.clone() for value in self._newest]
        self._updates += 1
        self._show(self._newest)
        # A backward saved the parameter, and `use` sets it to the right version before. Autograd does not know that,
        # and would raise because of the update.
        with torch.autograd._unsafe_preserve_version_counter(tuple(self._parameters)):
            update()

    def end(self) -> None:
        """End a call: set the parameters to the newest version. Does nothing between calls."""
        if self._newest is not None:
            self._show(self._newest)
        self._newest = None

    def _show(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.data = value
