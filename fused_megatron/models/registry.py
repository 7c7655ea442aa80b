"""The class of model for each kind of config."""

from typing import Any

from fused_megatron.config import BERTConfig, GPTConfig
from fused_megatron.models.bert import BERT
from fused_megatron.models.gpt import GPT


def new_model(config: GPTConfig, **layout: Any) -> GPT | BERT:
    """A GPT, or a BERT of a BERTConfig; `layout` as they take it."""
    return BERT(config, **layout) if isinstance(config, BERTConfig) else GPT(config, **layout)
