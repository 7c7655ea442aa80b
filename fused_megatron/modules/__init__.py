"""Drop-ins for torch.nn (same signature, defaults, state_dict), and replace_modules to put them into a model."""

from fused_megatron.modules.adopted_rms_norm import AdoptedRMSNorm
from fused_megatron.modules.cross_entropy import CrossEntropyLoss
from fused_megatron.modules.deferred_logits import DeferredLogits, LogitsHead
from fused_megatron.modules.fused_head import FusedHead
from fused_megatron.modules.fused_rotary import FusedRotary
from fused_megatron.modules.gated_mlp import GatedMLP
from fused_megatron.modules.gelu import GELU
from fused_megatron.modules.layer_norm import LayerNorm
from fused_megatron.modules.replacement import (
    Exchange,
    Left,
    Replaced,
    ReplacementReport,
    exchange_all,
    find_exchanges,
    named_once,
    replace_modules,
)
from fused_megatron.modules.rms_norm import RMSNorm

__all__ = [
    "GELU",
    "AdoptedRMSNorm",
    "CrossEntropyLoss",
    "DeferredLogits",
    "Exchange",
    "FusedHead",
    "FusedRotary",
    "GatedMLP",
    "LayerNorm",
    "Left",
    "LogitsHead",
    "RMSNorm",
    "Replaced",
    "ReplacementReport",
    "exchange_all",
    "find_exchanges",
    "named_once",
    "replace_modules",
]
