"""The settings of a run: frozen dataclasses that validate themselves, one file per section."""

from fused_megatron.config.data import DataConfig
from fused_megatron.config.model import (
    MODEL_FAMILIES,
    BERTConfig,
    GPTConfig,
    ModelFamily,
    TransformerConfig,
    model_config,
)
from fused_megatron.config.optimizer import OptimizerConfig
from fused_megatron.config.parallel import ParallelConfig
from fused_megatron.config.run import TrainConfig
from fused_megatron.config.training import TrainingConfig

__all__ = [
    "MODEL_FAMILIES",
    "BERTConfig",
    "DataConfig",
    "GPTConfig",
    "ModelFamily",
    "OptimizerConfig",
    "ParallelConfig",
    "TrainConfig",
    "TrainingConfig",
    "TransformerConfig",
    "model_config",
]
