"""Drop-ins for torch.nn: same signature, same defaults, same state_dict."""

from fused_megatron.modules.layer_norm import LayerNorm
from fused_megatron.modules.rms_norm import RMSNorm

__all__ = ["LayerNorm", "RMSNorm"]
