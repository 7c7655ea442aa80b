"""Versions of a stage's weights that microbatches under way still need (asynchronous schedules)."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from fused_megatron.pipeline.schedule.action import COMPUTE, Schedule, weight_versions


class StashedWeights:
    """The weights of one stage, of which the parameters show one version at a time.

    Args:
        module: the stage.
        stage: its index.
        schedule: says which version each microbatch uses, and so how long one is kept.

    Memory: the newest version and those that are still to be used, `schedule.peak_weight_versions` at most.
    """

    def __init__(self, module: nn.Module, stage: int, schedule: Schedule) -> None:
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        versions = weight_versions(schedule)
        self._version_of = {microbatch: version for (owner, microbatch), version in versions.items() if owner == stage}
        self._uses = Counter(
            self._version_of[action.microbatch]
            for actions in schedule.actions
            for action in actions
            if action.stage == stage and action.kind in COMPUTE
        )
        self._left: Counter[int] = Counter()
        self._values: dict[int, list[torch.Tensor]] = {}
        self._newest = 0

    def begin(self) -> None:
        """A step's first version is what the parameters hold now."""
        self._newest, self._left = 0, Counter(self._uses)
        self._values = {0: [p.data for p in self._parameters]}

    def use(self, microbatch: int) -> None:
        """Show the version of a microbatch, for one action."""
        version = self._version_of[microbatch]
        self._show(self._values[version])
        self._left[version] -= 1
        self._drop_unused()

    def update(self, update: Callable[[], None]) -> None:
        """Show the newest version, and make the next one of it by an update of the parameters in place."""
        values = self._values[self._newest]
        if self._left[self._newest] > 0:
            values = [value.clone() for value in values]
        else:
            del self._values[self._newest]
        self._newest += 1
        self._values[self._newest] = values
        self._show(values)
        # What backward saved is the parameter, in the version that `use` shows then; autograd, which cannot know that,
        # would take the update for a fault.
        with torch.autograd._unsafe_preserve_version_counter(tuple(self._parameters)):
            update()

    def end(self) -> None:
        """Leave the parameters at the newest version, and keep nothing else; nothing if no step is under way."""
        if self._values:
            self._show(self._values[self._newest])
        self._values = {}

    def _show(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.data = value

    def _drop_unused(self) -> None:
        for version in [v for v in self._values if v != self._newest and self._left[v] <= 0]:
            del self._values[version]
