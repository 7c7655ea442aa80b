"""Builders of the mesh, the model and the pipeline stages that a run's config describes."""

import torch

from fused_megatron.assembly.model_stages import ModelStages
from fused_megatron.assembly.pipeline_plan import PipelinePlan, stage_spans
from fused_megatron.config import TrainConfig
from fused_megatron.mesh import Mesh, init_mesh
from fused_megatron.models import StageSpan, TransformerStack, new_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtypes of weights and activations, by their names in a config."""


def build_mesh(config: TrainConfig, device_type: str | None = None) -> Mesh:
    """Build the mesh of all ranks of the default process group.

    Raises:
        InputError: as init_mesh; or the global batch cannot be divided over the data-parallel ranks.

    Communication: as init_mesh.
    """
    parallel = config.parallel
    mesh = init_mesh(
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.data_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_parallel_size=parallel.expert_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        device_type=device_type,
        timeout_s=parallel.timeout_s,
    )
    config.check_data_parallel(mesh.dp_size)
    return mesh


def build_model(
    config: TrainConfig, mesh: Mesh, device: torch.device, stage: StageSpan | None = None
) -> TransformerStack:
    """Build this rank's shard of the model, or of one pipeline stage.

    Args:
        config: model.vocab_size must be given.
        mesh: its tensor-parallel ranks share each layer, its context-parallel ranks each sequence.
        device: of the parameters; "meta" gives only their shapes.
        stage: the stage to build; None: the whole model.

    Raises:
        InputError: vocab_size is None, or sizes cannot be divided over the ranks.
    """
    parallel = config.parallel
    return new_model(
        config.model,
        layout=mesh.layout(
            sequence_parallel=parallel.sequence_parallel,
            overlap=parallel.overlap,
            context_parallel_method=parallel.context_parallel_method,
            expert_dispatch=parallel.expert_dispatch,
        ),
        seed=config.training.seed,
        stage=stage,
        dtype=DTYPES[config.training.weight_dtype],
        device=device,
    )


def build_stages(config: TrainConfig, mesh: Mesh, plan: PipelinePlan, device: torch.device) -> ModelStages:
    """Build this rank's shard of its pipeline stages. Arguments and errors: as build_model and stage_spans."""
    return ModelStages(
        stage_spans(config, plan), plan.placement, mesh.pp_group, lambda span: build_model(config, mesh, device, span)
    )
