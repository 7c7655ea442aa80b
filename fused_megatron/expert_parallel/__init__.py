"""Feed-forward experts that ranks share, and the exchange of tokens between these ranks."""

from fused_megatron.config.parallel import cheapest_dispatch
from fused_megatron.expert_parallel.experts import DISPATCHES, ExpertMLP
from fused_megatron.expert_parallel.route_counts import ASSUMED_ROUTES

__all__ = ["ASSUMED_ROUTES", "DISPATCHES", "ExpertMLP", "cheapest_dispatch"]
