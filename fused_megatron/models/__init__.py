"""GPT and BERT, built from the tensor-parallel layers, and their cut into pipeline stages.

Each name is imported at its first use: stage_cut.py needs no torch, and formulas that use it start without.
"""

import importlib
from typing import TYPE_CHECKING

from fused_megatron.deprecation import renamed_names

if TYPE_CHECKING:
    from fused_megatron.models.attention import ParallelSelfAttention
    from fused_megatron.models.bert import BERT
    from fused_megatron.models.block import TransformerBlock
    from fused_megatron.models.dropout import BatchSlice
    from fused_megatron.models.gpt import GPT
    from fused_megatron.models.mixture_of_experts import MixtureOfExperts
    from fused_megatron.models.parallel_mlp import ParallelMLP
    from fused_megatron.models.registry import new_model
    from fused_megatron.models.stack import TransformerStack
    from fused_megatron.models.stage_cut import StageSpan, cut_stages

__all__ = [
    "BERT",
    "GPT",
    "BatchSlice",
    "MixtureOfExperts",
    "ParallelMLP",
    "ParallelSelfAttention",
    "StageSpan",
    "TransformerBlock",
    "TransformerStack",
    "cut_stages",
    "new_model",
]

_HOME = {
    "BERT": "bert",
    "GPT": "gpt",
    "BatchSlice": "dropout",
    "MixtureOfExperts": "mixture_of_experts",
    "ParallelMLP": "parallel_mlp",
    "ParallelSelfAttention": "attention",
    "StageSpan": "stage_cut",
    "TransformerBlock": "block",
    "TransformerStack": "stack",
    "cut_stages": "stage_cut",
    "new_model": "registry",
}
_renamed = renamed_names(__name__, {"BatchPosition": "BatchSlice"})


def __getattr__(name: str) -> object:
    if name not in _HOME:
        return _renamed(name)
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
