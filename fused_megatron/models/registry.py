"""Table of the model families, and a function that builds a model from its config."""

from typing import Any

import torch

from fused_megatron.config import TransformerConfig
from fused_megatron.mesh import ParallelLayout
from fused_megatron.models.bert import BERT
from fused_megatron.models.gpt import GPT
from fused_megatron.models.stack import TransformerStack
from fused_megatron.models.stage_cut import StageSpan

# Keys are the names of config.MODEL_FAMILIES.
MODELS: dict[str, type[Any]] = {"gpt": GPT, "bert": BERT}


def new_model(
    config: TransformerConfig,
    *,
    layout: ParallelLayout | None = None,
    seed: int = 0,
    stage: StageSpan | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> TransformerStack:
    """Build the model of config.family; arguments as GPT."""
    model: TransformerStack = MODELS[config.family](
        config, layout=layout, seed=seed, stage=stage, dtype=dtype, device=device
    )
    return model
