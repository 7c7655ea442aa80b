"""Start here when the predicted bytes of an optimizer's state differ from the bytes of its tensors."""

import dataclasses
from typing import Any

import pytest
import torch

from fused_megatron.assembly.assemble import assemble
from fused_megatron.assembly.build import build_mesh, build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.config import GPTConfig, OptimizerConfig, TrainConfig, TrainingConfig
from fused_megatron.planning.optimizer_memory import update_bytes
from fused_megatron.planning.rank_memory import rank_memory

CONFIG = TrainConfig(
    GPTConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, activation="swiglu", seq_len=8, vocab_size=50),
    training=TrainingConfig(global_batch_size=2, microbatch_size=2),
)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"kind": "sgd"},
    {"kind": "sgd", "momentum": 0.0},
    {"kind": "lion"},
    {"kind": "muon"},
    {"state_dtype": "bfloat16"},
    {"kind": "muon", "state_dtype": "bfloat16"},
]


def held_bytes(config: TrainConfig) -> int:
    mesh, plan = build_mesh(config), plan_pipeline(config)
    assembly = assemble(config, mesh, plan, build_stages(config, mesh, plan, torch.device("cpu")))
    return sum(tensor.nbytes for tensors in assembly.optimizer.state().values() for tensor in tensors.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_formula_is_the_bytes_of_the_tensors(settings: dict[str, Any], dtype: str) -> None:
    training = dataclasses.replace(CONFIG.training, dtype=dtype)
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(**settings), training=training)
    assert rank_memory(config).optimizer == held_bytes(config)


def test_an_update_in_place_needs_nothing_and_others_a_batch() -> None:
    model = CONFIG.model
    assert update_bytes(OptimizerConfig(), "float32", model, 10**9) == 0
    assert update_bytes(OptimizerConfig(kind="lion"), "float32", model, 10**9) == 8 * 2**24
    assert update_bytes(OptimizerConfig(kind="lion"), "float32", model, 100) == 800
    # The gate of the feed-forward is the largest matrix: 128 x 32.
    assert update_bytes(OptimizerConfig(kind="muon"), "bfloat16", model, 10**9) == 7 * 2 * 128 * 32
    assert update_bytes(OptimizerConfig(state_dtype="bfloat16"), "float32", model, 10**9) == 8 * 2**24
