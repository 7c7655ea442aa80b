"""Start here when a formula of memory, or the reading of a config.json, starts slowly: it imports torch."""

import subprocess
import sys

import pytest

from fused_megatron.assembly.microbatches import partition_of
from fused_megatron.config import GPTConfig, OptimizerConfig, ParallelConfig, TrainConfig, TrainingConfig
from fused_megatron.context_parallel.methods import METHODS
from fused_megatron.data_parallel.muon import Muon
from fused_megatron.data_parallel.update_rules import ELEMENTWISE_RULES
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.ops.linear_cross_entropy_tile_shape import tile_bytes
from fused_megatron.overlap.chunk_choice import chunk_choice
from fused_megatron.planning import optimizer_memory, working_memory

MODULES = (
    "planning.prediction.step_time",
    "planning.rank_memory",
    "planning.engine_memory",
    "planning.rank_communication",
    "hugging_face.known_families",
)


def test_formulas_start_without_torch() -> None:
    names = ", ".join(f"fused_megatron.{name}" for name in MODULES)
    code = f"import sys, {names}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_constants_equal_the_values_beside_torch() -> None:
    assert tile_bytes("cuda") == working_memory._TILE_BYTES
    for overlap in (True, False, 1, 2, 4):
        assert ParallelConfig(overlap=overlap).whole_products == (chunk_choice(overlap).fixed == 1)
    for kind in ("sgd", "lion", "adamw"):
        config = OptimizerConfig(kind=kind)
        assert optimizer_memory._state_tensors(config) == len(ELEMENTWISE_RULES[kind](config).state_names)
    assert optimizer_memory._state_tensors(OptimizerConfig(kind="sgd", momentum=0.0)) == 0
    assert len(Muon.state_names) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [1, 2, 4, 6])
def test_most_positions_are_of_the_largest_part(method: str, ranks: int) -> None:
    for seq_len, tp in ((52, 2), (48, 4), (77, 1)):
        config = TrainConfig(
            GPTConfig(num_heads=48, hidden_size=48, seq_len=seq_len),
            ParallelConfig(
                tensor_parallel_size=tp,
                sequence_parallel=tp > 1,
                context_parallel_size=ranks,
                context_parallel_method=method,
            ),
            training=TrainingConfig(),
        )
        assert config.most_positions == max(partition_of(config, AttentionMask()).sizes)
