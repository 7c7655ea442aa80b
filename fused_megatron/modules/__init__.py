"""Drop-ins for torch.nn: same signature, same defaults, same state_dict."""

from fused_megatron.modules.layer_norm import LayerNorm

__all__ = ["LayerNorm"]
