"""Assembly of one rank's training parts: gradient buckets, pipeline executor and optimizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fused_megatron.assembly.microbatches import Microbatches
from fused_megatron.assembly.model_stages import ModelStages
from fused_megatron.assembly.optimizer import new_optimizer
from fused_megatron.assembly.pipeline_plan import PipelinePlan
from fused_megatron.assembly.stage_updates import StageUpdates
from fused_megatron.collectives import Group
from fused_megatron.config import TrainConfig
from fused_megatron.data.batch import Batch
from fused_megatron.data_parallel.optimizer import Optimizer
from fused_megatron.data_parallel.placement import ZERO_STAGES, zero_stage
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.data_parallel.row_blocks import gather_whole
from fused_megatron.data_parallel.sharded_weights import ShardedWeights
from fused_megatron.data_parallel.shared_state import Weights, replicas_of, share_state
from fused_megatron.data_parallel.weight_gather import WeightGather
from fused_megatron.mesh import Mesh
from fused_megatron.models import BatchSlice
from fused_megatron.models.expert_loads import ExpertLoads
from fused_megatron.pipeline.run.channels import Transport
from fused_megatron.pipeline.run.executor import PipelineExecutor
from fused_megatron.pipeline.run.stage_hooks import StageFunctions
from fused_megatron.pipeline.schedule.action import Action, Kind
from fused_megatron.sharding import Replicas
from fused_megatron.sharding.gradient_norm import sum_of_counted_squares
from fused_megatron.sharding.replicas import find_drift


@dataclass(frozen=True)
class Assembly:
    """Training parts of one rank, built by assemble().

    Attributes:
        config, mesh, plan, model: arguments of assemble().
        parameters: this rank's parameters, each once, by their names in the whole model.
        gradients: float32 gradients of this rank's rows of all parameters, summed over the replicas of each parameter.
        executor: runs this rank's stages in the order of the schedule.
        optimizer: updates this rank's rows of the parameters from the gradients.
        weights: gathers the other rows of the parameters if this rank updates or keeps only some of them.
        splits_backward: True if the schedule computes weight gradients in actions of their own.
        own_weights: the rows of the parameters that this rank updates, by the same names.
        replicas: ranks that own the other rows and the same rows, of dense parameters and of experts.
        expert_loads: loads of this rank's experts over the microbatches of a step.
        microbatches: cuts a batch into this rank's microbatches.
        updates: updates of this rank's stage inside an asynchronous schedule; None with a synchronous one.
    """

    config: TrainConfig
    mesh: Mesh
    plan: PipelinePlan
    model: ModelStages
    parameters: Mapping[str, nn.Parameter]
    gradients: GradientBuckets
    executor: PipelineExecutor
    optimizer: Optimizer
    weights: Weights
    splits_backward: bool
    own_weights: Mapping[str, torch.Tensor]
    replicas: Replicas
    expert_loads: ExpertLoads
    microbatches: Microbatches
    updates: StageUpdates | None = None

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(iter(self.parameters.values())).device

    def accumulate_batch(self, batch: Batch, step: int, loss_divisor: float) -> torch.Tensor:
        """Cut this data-parallel rank's rows of a global batch into microbatches, and accumulate their gradients.

        Args:
            batch: all rows of this rank. In the global batch they follow the rows of the previous data-parallel rank.
            step: number of the optimizer step; dropout masks depend on it and on a row's index in the global batch.
            loss_divisor: number of targets over all data-parallel and context-parallel ranks.

        Returns, Raises, Communication: as accumulate_gradients.

        The messages of the pipelines and the collectives inside the stages cannot deadlock. All ranks that share a
        stage (over tp, cp and dp) have the same list of actions, each in its own pipeline, and the lists of one
        pipeline cannot deadlock (lowering.py): there is an order in which it could run its actions one by one. Follow
        this order. At each action, all ranks that share its stage have finished their earlier actions, so they all
        reach it; its messages have been sent, and its collectives have all their ranks.
        """
        inputs, targets, keywords = self.microbatches_of(batch, step)
        return self.accumulate_gradients(inputs, targets, loss_divisor=loss_divisor, stage_kwargs=keywords)

    def microbatches_of(
        self, batch: Batch, step: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[dict[str, Any]]]:
        """Return (inputs, targets, keyword arguments of the stages) of each microbatch, as accumulate_batch."""
        training = self.config.training
        inputs, targets, keywords = self.microbatches.of(batch, self.device)
        first_sample = self.mesh.dp_rank * training.microbatch_size * len(inputs)
        slices = [
            BatchSlice(step, first_sample + i * training.microbatch_size, training.global_batch_size)
            for i in range(len(inputs))
        ]
        of_stages = [{"batch_slice": rows, **keyword} for rows, keyword in zip(slices, keywords, strict=True)]
        return inputs, targets, of_stages

    def accumulate_gradients(
        self,
        inputs: Sequence[Any],
        targets: Sequence[Any],
        *,
        loss_divisor: float,
        stage_kwargs: Sequence[Mapping[str, Any]] | None = None,
    ) -> torch.Tensor:
        """Run forward and backward of all microbatches; add their gradients to the buckets and sum them over dp and cp.

        Arguments, result and errors: as PipelineExecutor.step. Communication: of PipelineExecutor.step and of the
        buckets' reduction.
        """
        if not self.splits_backward:
            self.gradients.reduce_after_backwards(len(inputs))
        losses = self.executor.step(inputs, targets, loss_divisor=loss_divisor, stage_kwargs=stage_kwargs)
        self.gradients.finish_reduced()
        return losses

    def share_of_squares(self) -> torch.Tensor:
        """Return this rank's share of the sum of the squares of all gradients; the shares of all ranks add up to it.

        A 0-dim float64 tensor on the device of the gradients. Call it after accumulate_gradients. Replicas that hold
        the same gradients have equal shares, so that a NaN of one of them is in the sum.
        """
        shares = []
        for each, parameters in self.replicas.split(self.parameters):
            gradients = self.gradients.by_name(parameters)
            squares = sum_of_counted_squares(parameters, gradients, self.mesh.tp_rank, each.rows)
            shares.append(squares / each.num_copies)
        return torch.stack(shares).sum()

    def whole(self, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors in the shapes of the parameters, of which each replica has the rows that it owns.

        For inspection: gradients (rows of `gradients`) and main weights. Every rank calls it.

        Args:
            own: this rank's rows, by the names of all its parameters.

        Communication, Memory: as gather_whole, over the replicas of dense parameters and of experts.
        """
        found: dict[str, torch.Tensor] = {}
        for each, parameters in self.replicas.split({name: self.parameters[name] for name in own}):
            shapes = [parameter.shape for parameter in parameters.values()]
            whole = gather_whole([own[name] for name in parameters], shapes, each.rows, each.shard_group)
            found |= zip(parameters, whole, strict=True)
        return {name: found[name] for name in own}

    def find_drift(self) -> str | None:
        """Compare weights that several ranks hold: over dp and cp, replicated ones over tp, tied ones over pp.

        Experts are compared over the ranks with the same experts, and replicated ones over etp.

        Returns and Communication: as sharding.replicas.find_drift, for dense parameters and for experts.
        """
        keeps_rows = isinstance(self.weights, ShardedWeights)
        self.weights.finish()
        drifts = []
        for each, parameters in self.replicas.split(self.parameters):
            # Experts with the replicas of dense parameters are shared by tensor-parallel ranks.
            others: tuple[Group, ...] = (self.mesh.tp_group, self.mesh.pp_group)
            if each != self.replicas.dense:  # some stages of a pipeline may have no experts
                others = (self.mesh["etp"].group,)
            if keeps_rows:
                own = {name: self.own_weights[name] for name in parameters}
                drifts.append(find_drift(parameters, each.copy_group, others, own, each.rows))
            else:
                drifts.append(find_drift(parameters, each.group, others))
        return next(filter(None, drifts), None)

    def follow_newest_weights(self) -> None:
        """Let the optimizer and the gathers of weights refer to the memory that the parameters have now.

        An asynchronous schedule gives each version of the weights memory of its own.
        """
        assert isinstance(self.weights, WeightGather)
        self.weights.follow()
        own = {name: self.weights.own(parameter) for name, parameter in self.parameters.items()}
        for name, rows in own.items():
            self.own_weights[name].data = rows
        self.optimizer.follow(own)

    def update(
        self, lr: float, gradient_scale: float | torch.Tensor = 1.0, refused: torch.Tensor | None = None
    ) -> None:
        """Update the weights from the gradients times gradient_scale; the arguments are as in Optimizer.step.

        With `refused`, which the device reads, the same pass sets the gradients to 0 if it reaches all of them. Where
        each replica updates some rows, the others arrive under the next forward (WeightGather).
        """
        zeroes = refused is not None and self.gradients.has_own_only
        self.optimizer.step(lr, gradient_scale, refused, zeroes_gradients=zeroes)
        self.gradients.were_zeroed = zeroes
        self.weights.start()


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
        config: uses training.global_batch_size, microbatch_size and bucket_mb, parallel.timeout_s and
            scatter_messages, and optimizer.
        mesh: of all ranks.
        plan: the schedule of the pipeline.
        model: this rank's stages, with their initial weights.
        observe, transport: see PipelineExecutor.

    Raises:
        InputError: on every rank, as PipelineExecutor.

    Communication: as the constructors of GradientBuckets, WeightGather and PipelineExecutor.
    Memory: as GradientBuckets, WeightGather and Optimizer.
    """
    training = config.training
    parameters = model.parameters_by_name()
    has_experts = config.model.num_experts is not None
    placements = ZERO_STAGES[zero_stage(config.parallel.zero_stage, max(config.replica_counts(mesh.dp_size)))]
    replicas = replicas_of(mesh, placements, config.parallel.zero_shard_size, has_experts)
    gradients, weights = share_state(model.stages, placements, replicas, training.bucket_bytes(mesh.replicas.size))
    updates = StageUpdates(mesh["dp", "cp", "tp"].group) if plan.is_asynchronous else None
    hooks = _hooks(gradients, weights, plan, updates)
    if plan.max_unsharded is None:
        for stage in model.stages.values():
            weights.watch(stage)
    schedule = plan.lowered_schedule(training.global_batch_size // mesh.dp_size // training.microbatch_size)
    tied = model.tied()
    # The executor compares tied weights between stages.
    make_executor = weights.using([p for held in tied for p in held.values()], PipelineExecutor)
    executor = make_executor(
        schedule,
        model.stages,
        pp_group=mesh.pp_group,
        loss_fn=_loss_sum(model, weights, plan),
        tied=tied,
        hooks=hooks,
        timeout_s=config.parallel.timeout_s,
        scatter_group=mesh.tp_group if config.parallel.scatters_messages else None,
        auxiliary_losses=config.model.has_auxiliary_loss,
        observe=observe,
        transport=transport,
    )
    own = {name: weights.own(parameter) for name, parameter in parameters.items()}
    optimizer = new_optimizer(config, mesh, parameters, own, gradients)
    splits_backward = any(action.kind == Kind.WEIGHT_GRAD for actions in schedule.actions for action in actions)
    return Assembly(
        config,
        mesh,
        plan,
        model,
        parameters,
        gradients,
        executor,
        optimizer,
        weights,
        splits_backward,
        own_weights=own,
        replicas=replicas,
        expert_loads=ExpertLoads(config.model, model.stages.values()),
        microbatches=Microbatches(config, mesh, model),
        updates=updates,
    )


def _hooks(
    gradients: GradientBuckets, weights: Weights, plan: PipelinePlan, updates: StageUpdates | None
) -> StageFunctions:
    if updates is not None:
        return StageFunctions(reduce=gradients.reduce, update=updates.update)
    if plan.max_unsharded is None or isinstance(weights, WeightGather):
        return StageFunctions(reduce=gradients.reduce)
    return StageFunctions(reduce=gradients.reduce, unshard=weights.gather_stage, reshard=weights.release_stage)


def _loss_sum(
    model: ModelStages, weights: Weights, plan: PipelinePlan
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Return the loss of the last stage. It reads weights of modules whose forward it does not call."""
    last = model.stages.get(plan.num_stages - 1)
    if last is None:
        return None
    return model.loss_sum if plan.max_unsharded is not None else weights.using(last.head_parameters(), model.loss_sum)
