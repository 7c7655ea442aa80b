"""Feed-forward experts that ranks share, and the exchange of tokens between these ranks."""

from fused_megatron.expert_parallel.experts import DISPATCHES, ExpertMLP

__all__ = ["DISPATCHES", "ExpertMLP"]
