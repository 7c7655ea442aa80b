"""Test tools for parallel code, part of the package: real ranks, counts of collectives, justified tolerances."""

from fused_megatron.observe.record_communication import record_communication
from fused_megatron.testing.run_on_ranks import RankError, run_cases_on_ranks, run_on_ranks
from fused_megatron.testing.sharded_tolerances import assert_close

__all__ = ["RankError", "assert_close", "record_communication", "run_cases_on_ranks", "run_on_ranks"]
