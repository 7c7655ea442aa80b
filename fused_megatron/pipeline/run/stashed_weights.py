"""Older versions of a stage's weights, which microbatches under way still use (asynchronous schedules)."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from fused_megatron.pipeline.schedule.action import COMPUTE, Schedule, weight_versions


class StashedWeights:
    """Versions of the weights of one stage. The parameters hold one version at a time.

    Args:
        module: the module of the stage.
        stage: index of the stage.
        schedule: defines the version that each microbatch uses, and so how long a version is kept.

    Memory: the newest version and versions that are used later, at most `schedule.peak_weight_versions`.
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
        """Begin a step, whose first version is the present weights."""
        self._newest, self._left = 0, Counter(self._uses)
        self._values = {0: [p.data for p in self._parameters]}

    def use(self, microbatch: int) -> None:
        """Set the parameters to the version of a microbatch, for one action."""
        version = self._version_of[microbatch]
        self._show(self._values[version])
        self._left[version] -= 1
        self._drop_unused()

    def update(self, update: Callable[[], None]) -> None:
        """Set the parameters to the newest version, and make the next version by an update in place."""
        values = self._values[self._newest]
        if self._left[self._newest] > 0:
            values = [value.clone() for value in values]
        else:
            del self._values[self._newest]
        self._newest += 1
        self._values[self._newest] = values
        self._show(values)
        # A backward saved the parameter, and `use` sets it to the right version before. Autograd does not know that,
        # and would raise because of the update.
        with torch.autograd._unsafe_preserve_version_counter(tuple(self._parameters)):
            update()

    def end(self) -> None:
        """End a step: set the parameters to the newest version, and free the others. Does nothing between steps."""
        if self._values:
            self._show(self._values[self._newest])
        self._values = {}

    def _show(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.data = value

    def _drop_unused(self) -> None:
        for version in [v for v in self._values if v != self._newest and self._left[v] <= 0]:
            del self._values[version]
