"""What checks of parallel code need, shipped: run_on_ranks."""

from fused_megatron.testing.run_on_ranks import RankError, run_on_ranks

__all__ = ["RankError", "run_on_ranks"]
