"""The parts that a rank trains with, made from a run's config: gradient buckets, executor, optimizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fused_megatron.assembly.model_stages import ModelStages
from fused_megatron.assembly.pipeline_plan import PipelinePlan
from fused_megatron.config import TrainConfig
from fused_megatron.data_parallel.optimizer import Optimizer
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.mesh import Mesh
from fused_megatron.pipeline.run.channels import Transport
from fused_megatron.pipeline.run.executor import PipelineExecutor
from fused_megatron.pipeline.run.stage_hooks import StageFunctions
from fused_megatron.pipeline.schedule.action import Action, Kind


@dataclass(frozen=True)
class Assembly:
    """The parts of one rank. Made by assemble.

    Attributes:
        config, mesh, plan, model: what the rest was made from.
        parameters: this rank's, each once, by their names in the whole model.
        gradients: fp32 gradients of all parameters, summed over the data-parallel ranks.
        executor: runs this rank's stages in the order of the schedule.
        optimizer: updates the parameters from the gradients.
        splits_backward: whether the schedule puts weight gradients off.
    """

    config: TrainConfig
    mesh: Mesh
    plan: PipelinePlan
    model: ModelStages
    parameters: Mapping[str, nn.Parameter]
    gradients: GradientBuckets
    executor: PipelineExecutor
    optimizer: Optimizer
    splits_backward: bool

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(iter(self.parameters.values())).device

    def accumulate_gradients(
        self,
        inputs: Sequence[Any],
        targets: Sequence[Any],
        *,
        loss_divisor: float,
        stage_kwargs: Sequence[Mapping[str, Any]] | None = None,
    ) -> torch.Tensor:
        """Forward and backward of a step; the gradients add up to what the buckets hold, and are summed over dp.

        Arguments, result, errors and communication as PipelineExecutor.step, and that of the buckets.
        """
        if not self.splits_backward:
            self.gradients.reduce_after_backwards(len(inputs))
        return self.executor.step(inputs, targets, loss_divisor=loss_divisor, stage_kwargs=stage_kwargs)


def assemble(
    config: TrainConfig,
    mesh: Mesh,
    plan: PipelinePlan,
    model: ModelStages,
    observe: Callable[[Action, float, float], None] | None = None,
    transport: Transport | None = None,
) -> Assembly:
    """Join what a rank trains with. Every rank calls it at once.

    Args:
        config: training.global_batch_size, microbatch_size and bucket_mb, parallel.timeout_s, optimizer.
        mesh: of all ranks.
        plan: the schedule that the pipeline follows.
        model: this rank's stages, with the weights to start from.
        observe, transport: as PipelineExecutor takes them.

    Raises:
        InputError: on every rank, as PipelineExecutor.

    Communication: as GradientBuckets and PipelineExecutor when they are made.
    Memory: as GradientBuckets and Optimizer.
    """
    training = config.training
    parameters = model.parameters_by_name()
    gradients = GradientBuckets(
        {index: list(stage.parameters()) for index, stage in model.stages.items()},
        mesh.dp_group,
        bucket_bytes=1e6 * training.bucket_mb,
    )
    schedule = plan.schedule(training.global_batch_size // mesh.dp_size // training.microbatch_size)
    executor = PipelineExecutor(
        schedule,
        model.stages,
        pp_group=mesh.pp_group,
        loss_fn=model.loss_sum if plan.num_stages - 1 in model.stages else None,
        tied=model.tied(),
        hooks=StageFunctions(reduce=gradients.reduce),
        timeout_s=config.parallel.timeout_s,
        auxiliary_losses=config.model.has_auxiliary_loss,
        observe=observe,
        transport=transport,
    )
    optimizer = Optimizer(parameters, gradients.by_name(parameters), config.optimizer)
    splits_backward = any(action.kind == Kind.WEIGHT_GRAD for actions in schedule.actions for action in actions)
    return Assembly(config, mesh, plan, model, parameters, gradients, executor, optimizer, splits_backward)
