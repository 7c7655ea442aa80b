"""Our GPT in every layout, as the trainer runs it: stages, buckets of gradients, executor, optimizer."""

from collections.abc import Mapping

import torch
from gpt_layouts import BETAS, EPS, LR, WEIGHT_DECAY, Layout, Size, TrainingStep, Weights, own_rows
from torch import nn

from fused_megatron.assembly.model_stages import ModelStages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.config import OptimizerConfig, ParallelConfig, TrainConfig
from fused_megatron.data_parallel.optimizer import Optimizer
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.mesh import init_mesh
from fused_megatron.models.stage_cut import cut_stages
from fused_megatron.pipeline import Action
from fused_megatron.pipeline.run.executor import PipelineExecutor
from fused_megatron.pipeline.schedule.action import COMPUTE, WEIGHT_GRAD
from fused_megatron.sharding import copy_shard_
from fused_megatron.training.train import build_model


def our_step(size: Size, layout: Layout, weights: Weights) -> TrainingStep:
    """Ours."""
    config = train_config(size, layout)
    mesh, plan = init_mesh(layout.tp, layout.pp, layout.dp), plan_pipeline(config)
    spans = cut_stages(config.model, plan.num_stages, config.parallel.pipeline_cut, placement=plan.placement)
    model = ModelStages(
        spans, plan.placement, mesh.pp_group,
        lambda span: build_model(config.model, mesh, config, torch.device("cpu"), span),
    )  # fmt: skip
    parameters = model.parameters_by_name()
    load(parameters, weights)
    gradients = GradientBuckets({i: list(stage.parameters()) for i, stage in model.stages.items()}, mesh.dp_group)
    schedule = plan.schedule(layout.microbatches)
    splits_backward = any(a.kind == WEIGHT_GRAD for actions in schedule.actions for a in actions)
    step = TrainingStep(lambda tokens, target: None, schedule)

    def observe(action: Action, start: float, end: float) -> None:
        if action.kind in COMPUTE:
            step.actions.append((action.stage, action.kind, end - start))

    executor = PipelineExecutor(
        schedule, model.stages, pp_group=mesh.pp_group,
        loss_fn=model.loss_sum if plan.num_stages - 1 in model.stages else None,
        tied=model.tied(), reduce_gradients=gradients.reduce, observe=observe if layout.pp > 1 else None,
    )  # fmt: skip
    optimizer = Optimizer(parameters, gradients, config.optimizer)

    def run(tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        step.actions.clear()
        gradients.zero_()
        if not splits_backward:
            gradients.reduce_after_backwards(layout.microbatches)
        inputs, targets = zip(*own_rows((tokens, target), layout, mesh.dp_rank), strict=True)
        loss = executor.step(inputs, targets, loss_divisor=target.numel())
        optimizer.step(LR)
        return loss * layout.dp

    step.run = run
    return step


def train_config(size: Size, layout: Layout) -> TrainConfig:
    """What a user would write for `fused-megatron train`."""
    parallel = ParallelConfig(
        tensor_parallel_size=layout.tp, pipeline_parallel_size=layout.pp, data_parallel_size=layout.dp,
        sequence_parallel=layout.sequence_parallel, schedule=layout.schedule, stages_per_rank=layout.stages_per_rank,
    )  # fmt: skip
    optimizer = OptimizerConfig(lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=WEIGHT_DECAY)
    return TrainConfig(model=size.config, parallel=parallel, optimizer=optimizer)


def load(parameters: Mapping[str, nn.Parameter], weights: Weights) -> None:
    """This rank's shards of the full weights."""
    for name, parameter in parameters.items():
        copy_shard_(parameter, weights[name])
