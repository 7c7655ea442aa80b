"""Updates of a pipeline stage inside an asynchronous schedule."""

from collections.abc import Sequence
from typing import Protocol

import torch

from fused_megatron.collectives import Group
from fused_megatron.collectives.together import sum_over_ranks_
from fused_megatron.config import TrainConfig
from fused_megatron.data_parallel.optimizer import Optimizer
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.data_parallel.shared_state import Weights
from fused_megatron.sharding.gradient_norm import clip_coefficient_on_device


class Updated(Protocol):
    """The parts of an Assembly that an update needs."""

    @property
    def config(self) -> TrainConfig: ...
    @property
    def gradients(self) -> GradientBuckets: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def weights(self) -> Weights: ...
    def share_of_squares(self) -> torch.Tensor: ...
    def follow_newest_weights(self) -> None: ...
    def update(
        self, lr: float, gradient_scale: float | torch.Tensor = ..., refused: torch.Tensor | None = ...
    ) -> None: ...


class StageUpdates:
    """Updates of this rank's stage inside an asynchronous schedule: the `update` hook of the executor.

    A stage does not wait for the other stages: it clips by the norm of its own gradients, over the ranks that share the
    stage. A norm that is not finite keeps the weights of the stage, at this update and at all later ones.

    Args:
        stage_group: all ranks of the stage: its data-, context- and tensor-parallel ranks.

    Attributes:
        squares: sums of the squares of the stage's gradients, one for each update since begin().
    """

    def __init__(self, stage_group: Group) -> None:
        self._group = stage_group
        self._assembly: Updated | None = None
        self._lrs: Sequence[float] = ()
        self._refused: torch.Tensor | None = None
        self.squares: list[torch.Tensor] = []

    def begin(self, assembly: Updated, lrs: Sequence[float]) -> None:
        """Begin overlapping steps, whose updates have these learning rates."""
        self._assembly, self._lrs, self.squares = assembly, lrs, []
        assembly.gradients.begin()

    def update(self, stage: int, index: int) -> None:
        """Update the stage from its gradients, which are reduced, and zero these.

        Communication: as GradientBuckets.finish_reduced and the update of the optimizer; one all-reduce of 8 bytes over
        the ranks of the stage; with ZeRO-1 the gather of the weights.
        """
        assembly = self._assembly
        assert assembly is not None, "begin() comes first"
        assembly.gradients.finish_reduced()
        squares = assembly.share_of_squares().reshape(1)
        sum_over_ranks_(squares, self._group)
        self.squares.append(squares[0])
        norm = squares[0].sqrt().float()  # in float32, as in step_sums.py
        refused = norm.isfinite().logical_not_()
        if self._refused is not None:
            refused.logical_or_(self._refused)
        self._refused = refused
        assembly.follow_newest_weights()
        scale = clip_coefficient_on_device(norm, assembly.config.optimizer.clip_norm)
        if assembly.optimizer.refuses_on_device:
            assembly.update(self._lrs[index], scale, refused)
        elif not refused.item():
            assembly.update(self._lrs[index], scale)
        assembly.weights.finish()  # later versions are copies of whole weights
        assembly.gradients.begin()
