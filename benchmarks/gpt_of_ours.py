"""Our GPT in every layout, as the trainer runs it: stages, gradient buckets, executor, optimizer."""

from collections.abc import Mapping

import torch
from gpt_layouts import BETAS, EPS, LR, WEIGHT_DECAY, Layout, Size, TrainingStep, Weights, own_rows
from torch import nn

from fused_megatron.assembly.assemble import assemble
from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.config import OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.pipeline import Action
from fused_megatron.pipeline.schedule.action import COMPUTE
from fused_megatron.sharding import copy_shard_


def our_step(size: Size, layout: Layout, weights: Weights) -> TrainingStep:
    """Build our provider."""
    config = train_config(size, layout)
    mesh, plan = build_mesh(config), plan_pipeline(config)
    model = build_stages(config, mesh, plan, torch.device("cpu"))
    load(model.parameters_by_name(), weights)
    step = TrainingStep(lambda tokens, target: None, plan.schedule(layout.microbatches))

    def observe(action: Action, start: float, end: float) -> None:
        if action.kind in COMPUTE:
            step.actions.append((action.stage, action.kind, end - start))

    assembly = assemble(config, mesh, plan, model, observe if layout.pp > 1 else None)

    def run(tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        step.actions.clear()
        assembly.gradients.zero_()
        inputs, targets = zip(*own_rows((tokens, target), layout, mesh.dp_rank), strict=True)
        loss = assembly.accumulate_gradients(inputs, targets, loss_divisor=target.numel())
        assembly.update(LR, 1.0)
        return loss * layout.dp

    step.run = run
    return step


def train_config(size: Size, layout: Layout) -> TrainConfig:
    """Return the config that a user would write for `fused-megatron train`."""
    parallel = ParallelConfig(
        tensor_parallel_size=layout.tp,
        pipeline_parallel_size=layout.pp,
        data_parallel_size=layout.dp,
        zero_stage=layout.zero_stage,
        sequence_parallel=layout.sequence_parallel,
        schedule=layout.schedule,
        stages_per_rank=layout.stages_per_rank,
        timeout_s=1800.0,
    )
    num_sequences = layout.num_sequences(size)
    training = TrainingConfig(
        global_batch_size=num_sequences, microbatch_size=num_sequences // layout.dp // layout.microbatches
    )
    optimizer = OptimizerConfig(lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=WEIGHT_DECAY)
    return TrainConfig(model=size.config, parallel=parallel, optimizer=optimizer, training=training)


def load(parameters: Mapping[str, nn.Parameter], weights: Weights) -> None:
    """Load this rank's shards of the full weights."""
    for name, parameter in parameters.items():
        copy_shard_(parameter, weights[name])
