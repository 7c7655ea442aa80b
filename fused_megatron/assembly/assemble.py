"""Assembly of one rank's training parts: gradient buckets, pipeline executor and optimizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fused_megatron.assembly.model_stages import ModelStages
from fused_megatron.assembly.pipeline_plan import PipelinePlan
from fused_megatron.config import TrainConfig
from fused_megatron.data.batch import Batch
from fused_megatron.data_parallel.optimizer import Optimizer
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.mesh import Mesh
from fused_megatron.models import BatchSlice
from fused_megatron.pipeline.run.channels import Transport
from fused_megatron.pipeline.run.executor import PipelineExecutor
from fused_megatron.pipeline.run.stage_hooks import StageFunctions
from fused_megatron.pipeline.schedule.action import Action, Kind


@dataclass(frozen=True)
class Assembly:
    """Training parts of one rank, built by assemble().

    Attributes:
        config, mesh, plan, model: arguments of assemble().
        parameters: this rank's parameters, each once, by their names in the whole model.
        gradients: fp32 gradients of all parameters, summed over the data-parallel ranks.
        executor: runs this rank's stages in the order of the schedule.
        optimizer: updates the parameters from the gradients.
        splits_backward: True if the schedule computes weight gradients in actions of their own.
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
        """Device of the parameters."""
        return next(iter(self.parameters.values())).device

    def accumulate_batch(self, batch: Batch, step: int, loss_divisor: float) -> torch.Tensor:
        """Cut this data-parallel rank's rows of a global batch into microbatches, and accumulate their gradients.

        Args:
            batch: all rows of this rank. In the global batch they follow the rows of the previous data-parallel rank.
            step: number of the optimizer step; dropout masks depend on it and on a row's index in the global batch.
            loss_divisor: number of targets over all data-parallel ranks.

        Nothing can deadlock between a pipeline's messages and the collectives inside its stages. The ranks that share a
        stage (over tp and dp) have the same list of actions, each in a pipeline of its own, and the lists of one
        pipeline cannot deadlock (lowering.py). Take the actions of all pipelines in an order in which one pipeline can
        do them one after the other. When it comes to an action, all ranks that share its stage have done the actions
        before it, so they all reach it, its messages are there, and its collectives find their partners.

        Returns, Raises, Communication: as accumulate_gradients.
        """
        training = self.config.training
        inputs, targets, keywords = batch.microbatches(training.microbatch_size, self.device)
        first_sample = self.mesh.dp_rank * training.microbatch_size * len(inputs)
        slices = [
            BatchSlice(step, first_sample + i * training.microbatch_size, training.global_batch_size)
            for i in range(len(inputs))
        ]
        return self.accumulate_gradients(
            inputs,
            targets,
            loss_divisor=loss_divisor,
            stage_kwargs=[{"batch_slice": rows, **keyword} for rows, keyword in zip(slices, keywords, strict=True)],
        )

    def accumulate_gradients(
        self,
        inputs: Sequence[Any],
        targets: Sequence[Any],
        *,
        loss_divisor: float,
        stage_kwargs: Sequence[Mapping[str, Any]] | None = None,
    ) -> torch.Tensor:
        """Run forward and backward of all microbatches; add their gradients to the buckets and sum them over dp.

        Arguments, result and errors: as PipelineExecutor.step. Communication: of PipelineExecutor.step and of the
        buckets' reduction.
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
    """Build the training parts of this rank. Every rank must call this together.

    Args:
        config: uses training.global_batch_size, microbatch_size and bucket_mb, parallel.timeout_s, and optimizer.
        mesh: of all ranks.
        plan: the schedule of the pipeline.
        model: this rank's stages, with their initial weights.
        observe, transport: see PipelineExecutor.

    Raises:
        InputError: on every rank, as PipelineExecutor.

    Communication: as the constructors of GradientBuckets and PipelineExecutor.
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
